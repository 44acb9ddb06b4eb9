"""Solving the flow's ordinary differential equation with torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from deflow.errors import UserError

Gradient = Literal["backprop", "adjoint"]

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

    def integrate(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        x_0: Tensor,
        gradient: Gradient = "backprop",
        parameters: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """The solution at t = 1, same shape as `x_0`.

        Args:
            velocity: `velocity(t, x)` with a scalar tensor `t`.
            x_0: the starting point.
            gradient: `backprop` through the solver's operations (memory grows with the steps), or `adjoint`, which
                solves a second ODE backward (constant memory; equal up to the solver's error).
            parameters: of `velocity`; only the adjoint method needs them.
        """
        settings: dict[str, Any] = {"method": (FIXED_GRID | ADAPTIVE)[self.method]}
        if self.method in ADAPTIVE:
            settings |= {"rtol": self.rtol, "atol": self.atol}
        else:
            # A fixed-grid method steps from one requested time to the next unless it is told the step's size.
            settings["options"] = {"grid_constructor": self._grid}
        ends = torch.tensor([0.0, 1.0], device=x_0.device)
        if gradient == "adjoint":
            return odeint_adjoint(velocity, x_0, ends, adjoint_params=parameters, **settings)[-1]
        return odeint(velocity, x_0, ends, **settings)[-1]

    def _grid(self, velocity: Any, x_0: Tensor, times: Tensor) -> Tensor:
        """Equal steps from the first to the last of `times`, in either direction."""
        return torch.linspace(float(times[0]), float(times[-1]), self.steps + 1, device=x_0.device)
