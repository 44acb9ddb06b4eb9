"""IAV against brute force and against what is known."""

from __future__ import annotations

import numpy as np
import pytest

from deflow.data.measures.iav import intrinsic_action_variance
from deflow.data.scales import standardised
from deflow.errors import UserError


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("standardise", [False, True])
def test_equals_brute_force(include_self: bool, standardise: bool) -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(80, 4)) * [1, 10, 0.1, 3], rng.normal(size=(80, 2))
    points = states / states.std(0) if standardise else states
    variances = []
    for i in range(80):
        order = sorted(range(80), key=lambda j: np.sum((points[i] - points[j]) ** 2))
        assert order[0] == i
        nearest = order[:5] if include_self else order[1:6]
        mean = actions[nearest].mean(0)
        variances.append(((actions[nearest] - mean) ** 2).sum(0) / 4)
    result = intrinsic_action_variance(states, actions, 5, include_self=include_self, standardise=standardise)
    assert result.per_dimension == pytest.approx(tuple(np.mean(variances, axis=0)), rel=1e-6)
    assert result.mean == pytest.approx(np.mean(variances))


@pytest.mark.parametrize("scale", [1e-10, 1e-7, 1.0, 1e4])
@pytest.mark.parametrize("constant", [0.0, 1 / 3, 300.0, 1e4])
def test_neither_units_nor_what_never_changes_make_a_difference(scale: float, constant: float) -> None:
    rng = np.random.default_rng(2)
    states = rng.normal(size=(500, 2))
    actions = np.sin(3 * states)
    plain = intrinsic_action_variance(states, actions)
    left_by_arithmetic = 1e-7 * min(scale, 1.0) * rng.normal(size=500)
    shown = np.column_stack([scale * states, np.full(500, constant), left_by_arithmetic])
    assert intrinsic_action_variance(shown, actions).mean == pytest.approx(plain.mean, rel=1e-3)


def test_points_are_in_deviations_from_their_mean() -> None:
    points = standardised(np.random.default_rng(3).normal([0.0, 500.0], [1e-3, 20.0], size=(400, 2)))
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(points.std(0), 1, atol=1e-4)


def test_known_conditional_variance() -> None:
    # a = f(s) + noise with variances 0.04 and 0.25. 20,000 states in the unit square: neighbours are about 0.01 apart,
    # over which f changes by 0.01, so it adds 1e-4. The estimate's relative error is about sqrt(2 / 20000).
    rng = np.random.default_rng(1)
    states = rng.uniform(size=(20_000, 2))
    noise = rng.normal(size=(20_000, 2)) * [0.2, 0.5]
    result = intrinsic_action_variance(states, states + noise, 5)
    assert result.per_dimension == pytest.approx((0.04, 0.25), rel=0.03)
    assert result.std == pytest.approx((0.2 + 0.5) / 2, rel=0.02)
    low, high = result.interval
    assert low < result.mean < high
    sampled = intrinsic_action_variance(states, states + noise, 5, sample=2000)
    assert sampled.states == 2000
    assert sampled.mean == pytest.approx(result.mean, rel=0.1)


def test_repeated_states_are_neighbours_of_each_other() -> None:
    actions = np.array([[0.0], [1.0], [5.0], [6.0]])
    states = np.array([[0.0], [0.0], [9.0], [9.0]])
    result = intrinsic_action_variance(states, actions, 2, include_self=True)
    assert result.mean == pytest.approx(0.5)


@pytest.mark.parametrize("neighbours", [1, 10])
def test_too_few(neighbours: int) -> None:
    with pytest.raises(UserError, match="neighbours"):
        intrinsic_action_variance(np.zeros((10, 1)), np.zeros((10, 1)), neighbours)
