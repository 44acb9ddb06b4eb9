"""Flow behaviour cloning: imitate the data with a flow, rewards ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss, Traits
from deflow.agents.base import Agent
from deflow.agents.noise import FlowNoise
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.ranges import Seed
from deflow.types import Batch, Spec


class FlowBC(Agent):
    r"""Flow matching on the data's actions; the policy is the flow itself, :math:`a = \mu_\psi(s, z)`.

    Source: the behaviour part of FQL (arXiv 2502.02538) and DeFlow (arXiv 2601.10471), acting alone.

    Args:
        spec: sizes of the task.
        behavior_flow: makes the BehaviorFlow from `spec`.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
    """

    behavior_flow: BehaviorFlow
    traits = Traits(imitates=True)

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
    ) -> None:
        super().__init__(spec, {"behavior_flow": behavior_flow(spec)}, optimizer, seed)

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield "behavior_flow", *self.behavior_flow.loss(batch, noise.x_0, noise.times)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z)
