"""The solvers: orders of convergence, and equality with loops written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deflow.flow.ode import Solver
from deflow.flow.path import straight_path


def decay(t: Tensor, x: Tensor) -> Tensor:
    """dx/dt = -2 x cos(t), with the solution x(1) = x(0) exp(-2 sin 1)."""
    return -2.0 * x * torch.cos(t)


@pytest.mark.parametrize("method,order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(method: str, order: int) -> None:
    # Halving the step divides the error by 2^order.
    x_0 = torch.ones(3, 2, dtype=torch.float64)
    exact = x_0 * math.exp(-2 * math.sin(1))
    errors = [(Solver(method, steps).integrate(decay, x_0) - exact).abs().max() for steps in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_euler_equals_the_loop() -> None:
    x = x_0 = torch.randn(5, 3)
    for i in range(10):
        x = x + 0.1 * decay(torch.tensor(i / 10), x)
    torch.testing.assert_close(Solver("euler", 10).integrate(decay, x_0), x)


def test_midpoint_equals_the_loop() -> None:
    x = x_0 = torch.randn(5, 3)
    for i in range(10):
        half = x + 0.05 * decay(torch.tensor(i / 10), x)
        x = x + 0.1 * decay(torch.tensor(i / 10 + 0.05), half)
    torch.testing.assert_close(Solver("midpoint", 10).integrate(decay, x_0), x)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4", "dopri5"])
def test_sampling_equals_torchdiffeq(method: str) -> None:
    solver, x_0 = Solver(method, 7), torch.randn(5, 3)
    torch.testing.assert_close(solver.sample(decay, x_0), solver.integrate(decay, x_0), rtol=1e-6, atol=1e-6)


def test_adaptive_meets_its_tolerance() -> None:
    x_0 = torch.ones(3, 2, dtype=torch.float64)
    solution = Solver("dopri5", rtol=1e-6, atol=1e-6).integrate(decay, x_0)
    torch.testing.assert_close(solution, x_0 * math.exp(-2 * math.sin(1)), rtol=1e-5, atol=1e-5)


def test_straight_path_reaches_both_ends() -> None:
    x_0, x_1 = torch.randn(2, 4, 3)
    assert torch.equal(straight_path(x_0, x_1, torch.zeros(4, 1))[0], x_0)
    torch.testing.assert_close(straight_path(x_0, x_1, torch.ones(4, 1))[0], x_1)
