"""Dropout whose draws come from outside, so that an update's random numbers follow from its seed and its number."""

from __future__ import annotations

import torch
from torch import Tensor


class Dropout:
    """Leaves out a share of a network's hidden values in training.

    Args:
        width: values of one row, over all layers that drop some.
        rate: share that is left out, in [0, 1).
    """

    def __init__(self, width: int, rate: float) -> None:
        self.width, self.rate = width, rate

    def draw(self, rows: int, generator: torch.Generator) -> Tensor | None:
        """What stays, bool of shape (rows, width); None if that is everything."""
        if self.rate == 0:
            return None
        return torch.rand(rows, self.width, generator=generator, device=generator.device) >= self.rate

    def __call__(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """`x` with zeros where `keep` is false, the rest enlarged so that the mean stays; `x` itself without `keep`."""
        return x if keep is None else x * keep / (1 - self.rate)
