"""What a network sees of a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LONGEST = 10_000.0  # wave length of the slowest sinusoidal feature, over 2 pi


class FourierFeatures(nn.Module):
    r"""Times -> :math:`[\cos 2\pi w t, \sin 2\pi w t]`, shape (batch, 1) -> (batch, width).

    Args:
        width: features, an even number.
        scale: standard deviation of the frequencies w at the start.
        learned: whether they train.
    """

    def __init__(self, width: int, scale: float, learned: bool) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(scale * torch.randn(width // 2), requires_grad=learned)

    def forward(self, times: Tensor) -> Tensor:
        angles = 2 * math.pi * times * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoidal(times: Tensor, width: int) -> Tensor:
    """Sines and cosines of wave lengths in a geometric series, shape (batch, 1) -> (batch, width).

    Source: "Attention is all you need" (arXiv 1706.03762), as diffusion models use it.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(LONGEST) / (half - 1) * torch.arange(half, device=times.device))
    angles = times * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
