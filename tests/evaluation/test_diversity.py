"""Diversity: modes, coverage, variance and distances of known actions, and the bimodal problem."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from studies import bimodal

from deflow.data.memory.transitions import Transitions
from deflow.evaluation.diversity import Neighbourhoods, diversity, draw_actions, modes
from deflow.policy import Policy
from deflow.types import Spec
from tests.agents.tester import Acting

RNG = np.random.default_rng(0)
TWO_MODES = np.concatenate([np.full((30, 2), -0.6), np.full((30, 2), 0.6)]) + 0.05 * RNG.standard_normal((60, 2))


class Fixed(Acting):
    """Draws from given actions."""

    def __init__(self, actions: list[list[float]]) -> None:
        super().__init__(Spec(1, 2))
        self.actions = torch.tensor(actions)

    def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.actions[torch.arange(len(observations)) % len(self.actions)]


def test_modes() -> None:
    centres = modes(TWO_MODES, radius=0.6)
    assert sorted(centres[:, 0].round(1).tolist()) == [-0.6, 0.6]
    assert len(modes(TWO_MODES[:30], radius=0.6)) == 1
    assert len(modes(np.concatenate([TWO_MODES, [[0.6, -0.9]]]), radius=0.6)) == 2  # one stray action is no mode
    assert modes(np.linspace(-1, 1, 30)[:, None], radius=0.01).shape == (0, 1)


def test_diversity_of_known_policies() -> None:
    around = Neighbourhoods(torch.zeros(3, 1), np.stack([TWO_MODES] * 3))
    both = diversity(Policy(Fixed([[-0.6, -0.6], [0.6, 0.6]])), around, samples=40, radius=0.6, seed=0)
    one = diversity(Policy(Fixed([[0.6, 0.6]])), around, samples=40, radius=0.6, seed=0)
    between = diversity(Policy(Fixed([[0.0, 0.0]])), around, samples=40, radius=0.5, seed=0)
    assert [result["modes"] for result in (both, one, between)] == [
        {"data": 2, "policy": 2},
        {"data": 2, "policy": 1},
        {"data": 2, "policy": 0},
    ]
    assert both["variance"]["policy"] == pytest.approx(0.36 * 40 / 39, rel=1e-4)
    assert one["variance"]["policy"] == pytest.approx(0, abs=1e-9)
    nearest = np.sqrt(np.square(TWO_MODES).mean(1)).min()
    assert between["distance_to_data"]["policy"] == pytest.approx(nearest, rel=1e-4)
    assert 0 < both["distance_to_data"]["data"] < 0.1


def test_neighbourhoods_are_the_nearest_states() -> None:
    rows = 50
    arrays = {
        "observations": np.linspace(0, 1, rows)[:, None],
        "actions": np.linspace(-1, 1, rows)[:, None].repeat(2, 1),
        "rewards": np.zeros(rows),
        "masks": np.ones(rows),
        "valids": np.append(np.ones(rows - 1), 0),
    }
    around = Neighbourhoods.of(Transitions.from_compact(arrays, "test"), 100, 3, horizon=1, seed=0)
    assert around.states.shape == (49, 1)
    assert around.actions.shape == (49, 3, 2)
    own = 2 * around.states.numpy() - 1
    assert np.abs(around.actions[:, 0] - own).max() < 1e-4
    assert np.abs(around.actions - own[:, None]).max() < 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_both_modes_are_kept_where_equal_and_the_better_taken_where_not(tmp_path: Path) -> None:
    learners = (["agent=deflow", bimodal.TRUST_REGION], 600, 3e-3), (["agent=fbrac"], 300, 5e-3)
    for overrides, updates, lr in learners:
        agent = bimodal.train(overrides, updates, hidden=64, lr=lr)
        assert min(bimodal.shares(bimodal.actions_at(agent, bimodal.EQUAL))) > 0.25
        if overrides[0] == "agent=deflow":
            agent.best_of_n = 8
            assert bimodal.shares(bimodal.actions_at(agent, bimodal.UNEQUAL))[1] > 0.8  # the rest is between the modes
    around = Neighbourhoods.of(bimodal.transitions(), 4, 32, horizon=1, seed=0)
    draw_actions(Policy(agent), around, 8, tmp_path / "actions.png", seed=0)
    assert (tmp_path / "actions.png").stat().st_size > 10_000
