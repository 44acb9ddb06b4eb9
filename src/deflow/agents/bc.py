"""BC: imitate the data with a Gaussian, rewards ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss, Traits
from deflow.agents.base import Agent
from deflow.agents.panels import Panel, loss_panel
from deflow.modules.gaussian_policy import GaussianPolicy
from deflow.ranges import Seed
from deflow.types import Batch, Spec


class ImitationNoise(NamedTuple):
    """Every random number of an update."""

    keep: Tensor | None  # what dropout leaves in, see `Dropout`


class BC(Agent):
    r"""Behaviour cloning, as a baseline of FQL (arXiv 2502.02538).

    .. math:: \min_\phi -E \log N(a; \mu_\phi(s), \sigma^2)

    It acts with the mean and explores with actions drawn around it.

    Args:
        spec: sizes of the task.
        actor: makes the GaussianPolicy.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
    """

    actor: GaussianPolicy
    traits = Traits(imitates=True)

    def __init__(
        self,
        spec: Spec,
        actor: Callable[[Spec], GaussianPolicy],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
    ) -> None:
        super().__init__(spec, {"actor": actor(spec)}, optimizer, seed)

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> ImitationNoise:
        return ImitationNoise(self.actor.net.dropout.draw(len(batch.actions), generator))

    def losses(self, batch: Batch, noise: ImitationNoise) -> Iterator[Loss]:
        yield "actor", *self.actor.loss(batch.observations, batch.actions, noise.keep)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.mode(observations)

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.sample(observations, z)

    def panels(self) -> list[Panel]:
        error = {"train/actor/squared_error": "training"}
        return [loss_panel("actor"), Panel("squared error of the mean", error, log=True)]
