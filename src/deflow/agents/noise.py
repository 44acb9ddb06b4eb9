"""The random draws of one update of a flow agent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deflow.types import Batch


class FlowNoise(NamedTuple):
    """Standard normal, shape (batch, action_dim) but for the last two; `times` and `levels` are uniform."""

    x_0: Tensor  # start of the flow-matching path
    times: Tensor  # uniform in [0, 1), shape (batch, 1)
    z: Tensor  # start of the policy's action at s
    z_next: Tensor  # start of the policy's action at s', or of several in consecutive rows
    levels: Tensor | None = None  # uniform in [0, 1), shape (batch, levels), for a critic that is a flow
    outcomes: Tensor | None = None  # start of the path to a step's outcome, shape (batch, outcome_dim)
    imagined: Tensor | None = None  # of steps in the model, shape (batch, steps, action_dim + outcome_dim)

    @classmethod
    def draw(
        cls,
        batch: Batch,
        generator: torch.Generator,
        levels: int = 0,
        next_draws: int = 1,
        outcome_dim: int = 0,
        imagined_steps: int = 0,
    ) -> FlowNoise:
        """Draw all.

        Args:
            batch: whose shape counts.
            generator: of the draws.
            levels: uniform numbers for each transition, see `FlowCritic`.
            next_draws: actions at s', at least 1.
            outcome_dim: of a model of the environment's steps, see `TransitionModel`; 0 if there is none.
            imagined_steps: that are taken in it.
        """
        shape, device = batch.actions.shape, batch.actions.device
        x_0, z, z_next = torch.randn(3, *shape, generator=generator, device=device)
        times, uniform = (torch.rand(shape[0], n, generator=generator, device=device) for n in (1, levels))
        if next_draws > 1:
            more = torch.randn(shape[0], next_draws - 1, shape[1], generator=generator, device=device)
            z_next = torch.cat([z_next[:, None], more], dim=1).flatten(0, 1)
        # Last of all, so that the other parts learn the same with a model beside them as without.
        outcomes = torch.randn(shape[0], outcome_dim, generator=generator, device=device) if outcome_dim else None
        if imagined_steps:
            size = shape[0], imagined_steps, shape[1] + outcome_dim
            return cls(x_0, times, z, z_next, uniform, outcomes, torch.randn(size, generator=generator, device=device))
        return cls(x_0, times, z, z_next, uniform, outcomes)
