"""Distilled: one network evaluation that imitates a trained policy of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss
from deflow.agents.base import Agent
from deflow.agents.noise import FlowNoise
from deflow.errors import UserError
from deflow.modules.one_step import OneStepActor
from deflow.policy import Policy
from deflow.ranges import Seed
from deflow.types import Batch, Spec


class Distilled(Agent):
    r"""A one-step generator of a trained policy's actions, for deployment.

    .. math:: \min_\omega E\|\mu_\omega(s, z) - sg[\pi(s, z)]\|^2

    over the data's states and the teacher's own noise: what is learned is the map from noise to action, not only its
    distribution, so no mode is lost between two of the teacher's. `train(ckpt=...)` takes the teacher's weights, and
    checkpoints hold them.

    Args:
        spec: sizes of the task.
        teacher: makes the agent to imitate.
        actor: makes the one-step network.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.

    Raises:
        UserError: if the teacher's action takes more than one noise vector, which is all that a one-step network sees.
    """

    teacher: Agent
    actor: OneStepActor

    def __init__(
        self,
        spec: Spec,
        teacher: Callable[..., Agent],
        actor: Callable[[Spec], OneStepActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
    ) -> None:
        super().__init__(spec, {"actor": actor(spec)}, optimizer, seed)
        self.teacher = teacher(spec=spec).requires_grad_(False)
        self._noise_shape = self.teacher.act_noise_shape
        if math.prod(self._noise_shape) != spec.action_dim:
            raise UserError(
                f"the teacher's action takes noise of shape {self._noise_shape}, a one-step policy one vector as long "
                "as the action: if it takes the best of several, distil it with +teacher.best_of_n=1; "
                "if it samples in several steps, or generates more than actions (agent.path), it cannot be distilled"
            )
        self._taught = Policy(self.teacher)

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        target = self._taught.actions(batch.observations, noise.z.unflatten(1, self._noise_shape))
        loss = (self.actor(batch.observations, noise.z) - target).square().mean()
        yield "actor", loss, {"loss": loss.detach()}

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.act(observations, z)

    def start_from(self, checkpoint: Mapping[str, Any]) -> None:
        self.teacher.load_state_dict(checkpoint["state_dict"])
