"""The trust region: where the multiplier comes to rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from deflow.errors import UserError
from deflow.modules.refiner import Refiner
from deflow.types import Spec

SPEC = Spec(observation_dim=2, action_dim=3)
OBSERVATIONS = torch.zeros(64, 2)


def linear_value(observations: Tensor, actions: Tensor) -> Tensor:
    """One member, Q = 1 + 0.01 * sum(a): its gradient is constant, so the best residual is known."""
    return (1.0 + 0.01 * actions.sum(-1))[None]


def train(refiner: Refiner, steps: int, lr: float = 3e-3) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(refiner.parameters(), lr=lr)
    metrics: dict[str, Tensor] = {}
    for _ in range(steps):
        loss, metrics = refiner.loss(OBSERVATIONS, torch.zeros(64, 3), linear_value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


def test_multiplier_settles_where_the_constraint_is_tight() -> None:
    # Maximise 0.01 * sum(da) / |Q| - alpha * mean(da^2) over 3 dimensions, |Q| about 1: da = 0.01 * 3 / (2 alpha).
    # The constraint mean(da^2) = delta then gives alpha = 0.015 / sqrt(delta).
    torch.manual_seed(0)
    delta = 1e-4
    metrics = train(Refiner(SPEC, hidden=(16,), delta=delta), steps=6000)
    assert float(metrics["squared_residual"]) == pytest.approx(delta, rel=0.1)
    assert float(metrics["alpha"]) == pytest.approx(0.015 / delta**0.5, rel=0.1)


def test_multiplier_moves_against_the_violation() -> None:
    refiner = Refiner(SPEC, hidden=(16,), delta=1e-4)
    with torch.no_grad():
        refiner.net.layers[-1].bias.fill_(0.5)  # far outside
    refiner.loss(OBSERVATIONS, torch.zeros(64, 3), linear_value)[0].backward()
    assert refiner.log_alpha.grad is not None
    assert refiner.log_alpha.grad < 0  # a descent step raises it


def test_fixed_alpha_multiplies_the_penalty_once() -> None:
    torch.manual_seed(0)
    refiner = Refiner(SPEC, hidden=(16,), lagrange=False, alpha=7.0)
    loss, metrics = refiner.loss(OBSERVATIONS, torch.zeros(64, 3), linear_value)
    torch.testing.assert_close(loss, metrics["value_loss"] + 7.0 * metrics["squared_residual"])
    assert "log_alpha" not in dict(refiner.named_parameters())


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"delta": -1.0}, {"alpha": 0.0}])
def test_limits_must_be_positive(wrong: dict) -> None:
    with pytest.raises(UserError, match="must be > 0"):
        partial(Refiner, SPEC)(**wrong)
