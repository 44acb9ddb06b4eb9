"""The constraints: where each multiplier comes to rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deflow.errors import UserError
from deflow.modules.refiner import Refiner
from deflow.types import Batch, Spec

SPEC = Spec(observation_dim=2, action_dim=3)
DATA_ACTION, NEXT_ACTION = -0.2, 0.1
ACTIONS = torch.full((64, 3), DATA_ACTION)
BATCH = Batch(torch.zeros(64, 2), ACTIONS, torch.zeros(64), torch.ones(64), torch.zeros(64, 2), ACTIONS)


def linear_value(observations: Tensor, actions: Tensor) -> Tensor:
    """One member, Q = 1 + 0.01 * sum(a): its gradient is constant, so the best action is known."""
    return (1.0 + 0.01 * actions.sum(-1))[None]


def loss_of(refiner: Refiner) -> tuple[Tensor, dict[str, Tensor]]:
    return refiner.loss(BATCH, torch.zeros(64, 3), torch.full((64, 3), NEXT_ACTION), linear_value)


def train(refiner: Refiner, steps: int = 1500, lr: float = 1e-2) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(refiner.parameters(), lr=lr)
    metrics: dict[str, Tensor] = {}
    for _ in range(steps):
        loss, metrics = loss_of(refiner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return metrics


# Maximise 0.01 * sum(a) / |Q| - multiplier * mean((a - centre)^2) over 3 dimensions, |Q| about 1: the best distance x
# from the centre is 0.01 * 3 / (2 * multiplier). The constraint x^2 = limit gives multiplier = 0.015 / sqrt(limit).


def test_the_trust_region_settles_where_it_is_tight() -> None:
    torch.manual_seed(0)
    metrics = train(Refiner(SPEC, hidden=(16,), trust_region=1e-4))
    assert float(metrics["trust_region/cost"]) == pytest.approx(1e-4, rel=0.1)
    assert float(metrics["trust_region/multiplier"]) == pytest.approx(0.015 / 1e-2, rel=0.1)


def test_each_dimension_settles_at_its_own_limit() -> None:
    torch.manual_seed(0)
    limits = [1e-4, 4e-4, 9e-4]
    refiner = Refiner(SPEC, hidden=(16,), trust_region=limits)
    metrics = train(refiner)
    residual = refiner.residual(BATCH.observations, torch.zeros(64, 3)).square().mean(0)
    assert residual.tolist() == pytest.approx(limits, rel=0.1)
    multipliers = [float(metrics[f"trust_region/multiplier_{i}"]) for i in range(3)]
    assert multipliers == pytest.approx([0.015 / limit**0.5 for limit in limits], rel=0.1)


@pytest.mark.parametrize(
    ("kind", "centre"), [("action_norm", 0.0), ("action_change", NEXT_ACTION), ("data_distance", DATA_ACTION)]
)
def test_every_constraint_settles_at_its_limit(kind: str, centre: float) -> None:
    torch.manual_seed(0)
    # A negligible fixed penalty stands in for the trust region, so that the other constraint decides.
    wide = {"lagrange": False, "alpha": 1e-6, "trust_region": 1.0}
    refiner = Refiner(SPEC, hidden=(16,), constraints=[{"kind": kind, "limit": 1e-3}], **wide)
    metrics = train(refiner)
    assert float(metrics[f"{kind}/cost"]) == pytest.approx(1e-3, rel=0.1)
    assert float(metrics[f"{kind}/multiplier"]) == pytest.approx(0.015 / 1e-3**0.5, rel=0.1)
    actions = refiner.refine(BATCH.observations, torch.zeros(64, 3))
    assert actions.mean().item() == pytest.approx(centre + 1e-3**0.5, abs=0.1 * 1e-3**0.5)


def test_the_multiplier_moves_against_the_violation() -> None:
    refiner = Refiner(SPEC, hidden=(16,), trust_region=1e-4)
    with torch.no_grad():
        refiner.net.layers[-1].bias.fill_(0.5)  # far outside
    loss, metrics = loss_of(refiner)
    loss.backward()
    assert metrics["trust_region/violation"] > 0
    gradient = refiner.constraints["trust_region"].log_multiplier.grad
    assert gradient is not None
    assert gradient < 0  # a descent step raises it


def test_a_fixed_alpha_multiplies_the_penalty_once() -> None:
    torch.manual_seed(0)
    refiner = Refiner(SPEC, hidden=(16,), lagrange=False, alpha=7.0)
    loss, metrics = loss_of(refiner)
    torch.testing.assert_close(loss, metrics["value_loss"] + 7.0 * metrics["trust_region/cost"])
    assert not [name for name, _ in refiner.named_parameters() if "multiplier" in name]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trust_region": [0.1, 0.1]}, "needs one limit or 3"),
        ({"constraints": [{"kind": "speed", "limit": 1}]}, "unknown constraint 'speed': choose one of trust_region"),
        ({"constraints": [{"kind": "trust_region", "limit": 1}]}, "given twice"),
    ],
)
def test_impossible_constraints_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Refiner(SPEC, **wrong)


def test_a_gradient_step_inside_a_wide_region_is_eta_along_the_normalised_gradient() -> None:
    torch.manual_seed(0)
    wide = {"lagrange": False, "alpha": 1e-6, "trust_region": 1.0}
    refiner = Refiner(SPEC, hidden=(16,), objective="gradient_step", eta=2.0, **wide)
    train(refiner, steps=1000)
    residual = refiner.residual(BATCH.observations, torch.zeros(64, 3))
    assert residual.mean().item() == pytest.approx(2.0 * 0.01 / 1.0, rel=0.05)  # |Q| = 1 at the proposal


def test_demonstrations_pull_toward_the_datas_action_as_far_as_the_region_goes() -> None:
    torch.manual_seed(0)
    free = Refiner(SPEC, hidden=(16,), objective="demonstration", lagrange=False, alpha=1e-6, trust_region=1.0)
    metrics = train(free, steps=1000)
    assert free.refine(BATCH.observations, torch.zeros(64, 3)).mean().item() == pytest.approx(DATA_ACTION, rel=0.05)
    # The data's action is worse than the proposal by 0.01 * 3 * 0.2.
    assert float(metrics["weight"]) == pytest.approx(math.exp(-3.0 * 0.006), rel=1e-4)
    held = Refiner(SPEC, hidden=(16,), objective="demonstration", trust_region=1e-3)
    assert float(train(held)["trust_region/cost"]) == pytest.approx(1e-3, rel=0.1)
