"""LossWatch: notices a loss that is not finite without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deflow.errors import NonFiniteLossError
from deflow.types import Metrics


class LossWatch:
    """Remembers on the device the first step at which each part's loss was NaN or infinite."""

    def __init__(self) -> None:
        self._bad_steps: dict[tuple[str, ...], Tensor] = {}  # of parts that train together; -1: none

    def see(self, losses: Sequence[tuple[str, Tensor, Metrics]], step: int) -> None:
        """Look at the losses of an update of the stage, counted from 1."""
        parts = tuple(part for part, _, _ in losses)
        finite = torch.stack([loss.detach() for _, loss, _ in losses]).isfinite()
        before = self._bad_steps.get(parts)
        if before is None:
            before = torch.full(finite.shape, -1, device=finite.device)
        self._bad_steps[parts] = torch.where(finite | (before >= 0), before, step)

    def check(self, stage: str) -> None:
        """Read what was seen, for which the device is waited for.

        Raises:
            NonFiniteLossError: naming the first part and step.
        """
        steps = [pair for parts, steps in self._bad_steps.items() for pair in zip(steps.tolist(), parts, strict=True)]
        bad = [(step, part) for step, part in steps if step >= 0]
        if bad:
            step, part = min(bad, key=lambda pair: pair[0])
            raise NonFiniteLossError(f"the loss of '{part}' is not finite at update {step} of stage '{stage}'")
