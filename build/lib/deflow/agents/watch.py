"""LossWatch: notices a loss that is not finite without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deflow.errors import NonFiniteLossError
from deflow.types import Metrics


class LossWatch:
    """Remembers on the device the first update at which each part's loss was NaN or infinite.

    What it keeps is changed in place alone, so that an update can be recorded as a CUDA graph.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None  # updates
        self._bad: dict[tuple[str, ...], Tensor] = {}  # of parts that train together: the first bad one; -1: none

    def see(self, losses: Sequence[tuple[str, Tensor, Metrics]]) -> None:
        """Look at the losses of an update."""
        parts = tuple(part for part, _, _ in losses)
        finite = torch.stack([loss.detach() for _, loss, _ in losses]).isfinite()
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.int64, device=finite.device)
        self._seen += 1
        if parts not in self._bad:
            self._bad[parts] = torch.full(finite.shape, -1, dtype=torch.int64, device=finite.device)
        bad = self._bad[parts]
        bad.copy_(torch.where(finite | (bad >= 0), bad, self._seen))

    def check(self, stage: str, step: int) -> None:
        """Read what was seen, for which the device is waited for.

        Args:
            stage: what the updates are of.
            step: number of the newest of them, counted from 1.

        Raises:
            NonFiniteLossError: naming the first part and update.
        """
        if self._seen is None:
            return
        before = step - int(self._seen)  # updates of the stage that another process has made
        numbers = [pair for parts, bad in self._bad.items() for pair in zip(bad.tolist(), parts, strict=True)]
        found = [(number, part) for number, part in numbers if number >= 0]
        if found:
            number, part = min(found, key=lambda pair: pair[0])
            update = before + number
            raise NonFiniteLossError(f"the loss of '{part}' is not finite at update {update} of stage '{stage}'")
