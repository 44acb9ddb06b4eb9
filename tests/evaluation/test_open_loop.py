"""Diagnostics of a model of the environment's steps, with models whose errors are known."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deflow.data.memory.transitions import Transitions
from deflow.evaluation.open_loop import draw_transitions, measure_transitions, steps_within
from deflow.modules.statistics import StepStatistics
from deflow.modules.transition_flow import Outcome, TransitionModel
from deflow.types import Batch, Metrics, Spec

STATISTICS: StepStatistics = {
    "observation_mean": [0.0],
    "observation_std": [2.0],
    "change_mean": [0.0],
    "change_std": [1.0],
    "reward_centre": 0.0,
    "reward_scale": 1.0,
}


class Walk(TransitionModel):
    """Knows that each step adds the action, with noise of a given deviation, and gives no reward."""

    def __init__(self, noise: float, within: float | None = None) -> None:
        super().__init__(Spec(1, 1), STATISTICS, within=within)
        self.noise = noise

    def loss(self, batch: Batch, x_0: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        nothing = torch.zeros(len(z), 1)
        return torch.cat([actions + self.noise * z[:, :1], nothing, nothing + 1], dim=-1)

    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        return self._outcome(observations, self(observations, actions, z))


def walks(lengths: list[int], noise: float) -> Transitions:
    """Random walks of so many steps, each of half a unit or of minus that and noise; rewards are -1."""
    rng = np.random.default_rng(0)
    states, actions, valids = [], [], []
    for length in lengths:
        moves = rng.choice([-0.5, 0.5], length)
        states.append(np.cumsum([0, *(moves + noise * rng.standard_normal(length))]))
        actions.append(np.append(moves, 0))
        valids.append(np.arange(length + 1) < length)
    rows = sum(lengths) + len(lengths)
    columns = {"observations": states, "actions": actions}
    arrays = {name: np.concatenate(of_all)[:, None] for name, of_all in columns.items()}
    arrays |= {"rewards": np.full(rows, -1.0), "masks": np.ones(rows), "valids": np.concatenate(valids)}
    return Transitions.from_compact(arrays, "walks")


def test_a_model_that_is_right() -> None:
    data = walks([60] * 4, noise=0.0)
    found = measure_transitions(Walk(noise=0.0), data, data, seed=0)
    assert found["trajectories"] == 4
    assert found["left_out"] == 0
    assert found["error"]["sample"] == pytest.approx({"1": 0, "5": 0, "25": 0, "50": 0}, abs=1e-5)
    assert found["error"]["nothing changes"]["1"] == pytest.approx(0.25)  # half a unit, of deviation 2
    assert found["spread"]["sample"] == pytest.approx(dict.fromkeys(("0", "0.1", "0.3", "1"), 0.0), abs=1e-6)
    assert found["reward_error"]["sample"] == pytest.approx(1.0)


def test_errors_and_calibration_of_noise() -> None:
    data = walks([200] * 4, noise=0.4)
    found = measure_transitions(Walk(noise=0.4), data, data, seed=0)
    drawn, mean = found["error"]["sample"], found["error"]["sample, mean"]
    for steps in (1, 5, 25):  # two independent walks, and one beside the mean of eight
        assert drawn[str(steps)] == pytest.approx(0.2 * np.sqrt(2 * steps), rel=0.25)
        assert mean[str(steps)] == pytest.approx(0.2 * np.sqrt(steps * 9 / 8), rel=0.25)
    assert found["coverage"]["sample"] == pytest.approx({"50%": 0.5, "90%": 0.9}, abs=0.1)
    assert found["spread"]["sample"]["0"] == pytest.approx(0.2, rel=0.05)
    too_sure = measure_transitions(Walk(noise=0.1), data, data, seed=0)["coverage"]["sample"]
    assert too_sure["90%"] < 0.5


def test_short_trajectories_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = measure_transitions(Walk(0.0), walks([60], 0.0), walks([30, 10, 30], 0.0), seed=0)
    assert "up to 25 steps: 1 of 3 validation trajectories are shorter and left out" in caplog.text
    assert (found["trajectories"], found["left_out"]) == (2, 1)
    assert list(found["error"]["sample"]) == ["1", "5", "25"]


@pytest.mark.usefixtures("rendered")
def test_the_picture_with_and_without_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = walks([60], noise=0.4)
    for held_out in (data, None):
        found = measure_transitions(Walk(0.4), data, held_out, seed=0)
        draw_transitions(found, tmp_path / "transitions.png")
        assert (tmp_path / "transitions.png").stat().st_size > 5_000
    assert set(found) == {"spread"}
    assert "no validation data" in caplog.text


@pytest.mark.parametrize("within,allowed", [(0.5, 0), (9.0, 5)])
def test_steps_within_a_limit(within: float, allowed: int) -> None:
    # The model's errors are of two independent walks, and half a unit a step is what nothing changing misses as well.
    steps, errors = steps_within(Walk(0.4, within), walks([200] * 4, noise=0.4), most=5, seed=0)
    assert steps == allowed
    assert errors == pytest.approx([0.4 * np.sqrt(2 * n) / np.sqrt(n * (0.25 + 0.16)) for n in range(1, 6)], rel=0.35)


def test_a_model_that_is_right_may_take_all_steps_and_one_that_knows_nothing_none() -> None:
    data = walks([60] * 4, noise=0.0)
    assert steps_within(Walk(0.0, within=0.1), data, most=5, seed=0)[0] == 5
    assert steps_within(Walk(2.0, within=0.9), data, most=5, seed=0)[0] == 0


def test_steps_are_no_more_than_the_trajectories_have() -> None:
    steps, errors = steps_within(Walk(0.0, within=0.1), walks([3] * 4, noise=0.0), most=5, seed=0)
    assert (steps, errors) == (3, pytest.approx([0.0] * 3, abs=1e-5))
