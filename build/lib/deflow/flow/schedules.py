"""How much noise there is when: the schedules of diffusion and consistency models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA_MIN = 0.1  # of the variance-preserving process at its start
BETA_MAX, BETA_MAX_OF_STEPS = 20.0, 10.0  # at its end, in continuous time and in a few steps


def vp_betas(steps: int) -> Tensor:
    r"""Variances that so many steps of the variance-preserving process add, shape (steps,), float64.

    :math:`\beta_i = 1 - \exp(-b_{min} / T - (b_{max} - b_{min}) (2i - 1) / 2T^2)` for i = 1 ... T, as in Diffusion-QL
    (arXiv 2208.06193) and IDQL (arXiv 2304.10573).
    """
    number = torch.arange(1, steps + 1, dtype=torch.float64)
    exponent = BETA_MIN / steps + 0.5 * (BETA_MAX_OF_STEPS - BETA_MIN) * (2 * number - 1) / steps**2
    return 1 - torch.exp(-exponent)


def vp_levels(times: Tensor) -> tuple[Tensor, Tensor]:
    r"""Signal and noise :math:`(\alpha_t, \sigma_t)` of the variance-preserving SDE at times in [0, 1], of their shape.

    Source: "Score-based generative modeling through SDEs" (arXiv 2011.13456).
    """
    signal = torch.exp(-0.25 * times.square() * (BETA_MAX - BETA_MIN) - 0.5 * times * BETA_MIN)
    return signal, (1 - signal.square()).sqrt()


def karras_times(index: Tensor, count: int | Tensor, low: float, high: float, rho: float) -> Tensor:
    r"""Boundary number `index` of `count` between the noise levels `low` and `high`, rising; of the index' shape.

    :math:`t_i = (low^{1/\rho} + i / (N - 1) (high^{1/\rho} - low^{1/\rho}))^\rho`, i = 0 ... N - 1 (arXiv 2206.00364).
    """
    first, last = low ** (1 / rho), high ** (1 / rho)
    return (first + index / (count - 1) * (last - first)) ** rho


def growing_count(step: int, steps: int, first: int, last: int) -> int:
    r"""Boundaries of a consistency model's time axis at `step` of `steps`, from `first` to `last` by a square root.

    Source: consistency models (arXiv 2303.01469), appendix C.
    """
    return math.ceil(math.sqrt(step / steps * (last**2 - first**2) + first**2) - 1) + 1
