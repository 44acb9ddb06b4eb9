"""The straight probability path of flow matching (Lipman et al., arXiv 2210.02747; rectified flow, 2209.03003)."""

from __future__ import annotations

from torch import Tensor


def straight_path(x_0: Tensor, x_1: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The point `x_t = (1 - t) x_0 + t x_1` and the velocity `x_1 - x_0` there.

    Args:
        x_0: noise, shape (batch, dim).
        x_1: data, shape (batch, dim).
        times: in [0, 1], shape (batch, 1).

    Returns:
        `(x_t, velocity)`, both of shape (batch, dim).
    """
    velocity = x_1 - x_0
    return x_0 + times * velocity, velocity
