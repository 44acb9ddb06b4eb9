"""Solving the flow's ordinary differential equation: with torchdiffeq, and on a fixed grid without waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from deflow.ranges import Count, Positive

Gradient = Literal["backprop", "adjoint"]
Method = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]

# Name in the configuration -> torchdiffeq's name.
FIXED_GRID = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}
ADAPTIVE = {"dopri5": "dopri5"}

# Butcher tableaus (c, rows of a, b) of the fixed-grid methods, as torchdiffeq has them (its rk4 is the 3/8 rule).
TABLEAUS: dict[str, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": ((0,), ((),), (1,)),
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}


@dataclass(frozen=True)
class Solver:
    """How to integrate `dx/dt = v(t, x)` from t = 0 to t = 1.

    Args:
        method: `euler`, `midpoint`, `heun` or `rk4` on a fixed grid, or the adaptive `dopri5`.
        steps: equal steps of a fixed grid; not used by an adaptive method.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
    """

    method: Method = "euler"
    steps: Count = 10
    rtol: Positive = 1e-4
    atol: Positive = 1e-4

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

    @torch.no_grad()
    def sample(self, velocity: Callable[[Tensor, Tensor], Tensor], x_0: Tensor) -> Tensor:
        """The solution without gradient; otherwise as `walk`."""
        return self.walk(velocity, x_0)

    def walk(self, velocity: Callable[[Tensor, Tensor], Tensor], x_0: Tensor) -> Tensor:
        """The solution with a gradient by back-propagation; otherwise as `integrate`.

        A fixed grid is walked here: torchdiffeq compares times at every step, for which a GPU must be waited for.
        """
        if self.method in ADAPTIVE:
            return self.integrate(velocity, x_0)
        offsets, rows, weights = TABLEAUS[self.method]
        step = 1.0 / self.steps
        times = torch.linspace(0.0, 1.0, self.steps + 1, device=x_0.device)
        x = x_0
        for t in times[:-1]:
            slopes: list[Tensor] = []
            for offset, row in zip(offsets, rows, strict=True):
                slopes.append(velocity(t + offset * step, _combine(x, slopes, row, step)))
            x = _combine(x, slopes, weights, step)
        return x

    def _grid(self, velocity: Any, x_0: Tensor, times: Tensor) -> Tensor:
        """Equal steps from the first to the last of `times`, in either direction."""
        return torch.linspace(float(times[0]), float(times[-1]), self.steps + 1, device=x_0.device)


def _combine(x: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], step: float) -> Tensor:
    """`x + step * sum(weights * slopes)`."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            x = torch.add(x, slope, alpha=step * weight)
    return x
