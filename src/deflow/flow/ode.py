"""Solving the flow's ordinary differential equation with torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from deflow.errors import UserError

# Name in the configuration -> torchdiffeq's name.
FIXED_GRID = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}
ADAPTIVE = {"dopri5": "dopri5"}


@dataclass(frozen=True)
class Solver:
    """How to integrate `dx/dt = v(t, x)` from t = 0 to t = 1.

    Args:
        method: `euler`, `midpoint`, `heun` or `rk4` on a fixed grid, or the adaptive `dopri5`.
        steps: equal steps of a fixed grid; not used by an adaptive method.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.

    Raises:
        UserError: for a method that is not one of these, or fewer than 1 step.
    """

    method: str = "euler"
    steps: int = 10
    rtol: float = 1e-4
    atol: float = 1e-4

    def __post_init__(self) -> None:
        if self.method not in FIXED_GRID | ADAPTIVE:
            raise UserError(f"unknown solver.method '{self.method}': choose one of {', '.join(FIXED_GRID | ADAPTIVE)}")
        if self.steps < 1:
            raise UserError(f"solver.steps must be at least 1, got {self.steps}")

    def integrate(self, velocity: Callable[[Tensor, Tensor], Tensor], x_0: Tensor) -> Tensor:
        """The solution at t = 1, same shape as `x_0`.

        Args:
            velocity: `velocity(t, x)` with a scalar tensor `t`.
            x_0: the starting point.
        """
        ends = torch.tensor([0.0, 1.0], device=x_0.device)
        if self.method in ADAPTIVE:
            return odeint(velocity, x_0, ends, method=ADAPTIVE[self.method], rtol=self.rtol, atol=self.atol)[-1]
        # A fixed-grid method steps from one requested time to the next unless it is given a grid of its own.
        grid = torch.linspace(0.0, 1.0, self.steps + 1, device=x_0.device)
        options = {"grid_constructor": lambda *_: grid}
        return odeint(velocity, x_0, ends, method=FIXED_GRID[self.method], options=options)[-1]
