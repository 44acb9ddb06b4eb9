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
    """Knows that each step adds the action, with noise of a given deviation, and gives no reward.

    It ends the task when noise is above `ends_above`.
    """

    def __init__(self, noise: float, within: float | None = None, ends_above: float = np.inf) -> None:
        super().__init__(Spec(1, 1), STATISTICS, within=within)
        self.noise, self.ends_above = noise, ends_above

    def loss(self, batch: Batch, x_0: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        goes_on = torch.where(z[:, 2:] > self.ends_above, -1.0, 1.0)
        return torch.cat([actions + self.noise * z[:, :1], torch.zeros_like(goes_on), goes_on], dim=-1)

    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        return self._outcome(observations, self(observations, actions, z))


def walks(lengths: list[int], noise: float, move: float = 0.5, goal: bool = False) -> Transitions:
    """Random walks of so many steps, each of half a unit or of minus that and noise; rewards are -1.

    With a goal the last step of each ends its task.
    """
    rng = np.random.default_rng(0)
    states, actions, valids = [], [], []
    for length in lengths:
        moves = rng.choice([-move, move], length)
        states.append(np.cumsum([0, *(moves + noise * rng.standard_normal(length))]))
        actions.append(np.append(moves, 0))
        valids.append(np.arange(length + 1) < length)
    rows = sum(lengths) + len(lengths)
    columns = {"observations": states, "actions": actions}
    arrays = {name: np.concatenate(of_all)[:, None] for name, of_all in columns.items()}
    arrays |= {"rewards": np.full(rows, -1.0), "masks": np.ones(rows), "valids": np.concatenate(valids)}
    if goal:
        arrays["masks"][np.cumsum([length + 1 for length in lengths]) - 2] = 0
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


def test_errors_grow_with_the_distance_from_the_data() -> None:
    class Near(Walk):
        """Knows nothing of states far from 0."""

        def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
            outcome = super().forward(observations, actions, z)
            return torch.cat([outcome[:, :1] + 0.1 * observations.abs(), outcome[:, 1:]], dim=-1)

    training, held_out = walks([50], noise=0.0, move=0.0), walks([40] * 8, noise=0.0, move=1.0)
    found = measure_transitions(Near(0.0), training, held_out, seed=0)["error_by_distance"]
    distances, errors = zip(*found["sample"], strict=True)
    assert list(distances) == sorted(distances)
    # All data are at 0 and did nothing: the distance is of s / 2 and of an action of 1.
    far = [np.sqrt(2 * distance**2 - 1) * 2 for distance in distances]
    assert errors == pytest.approx([0.1 * each / 2 for each in far], rel=0.35, abs=0.05)
    assert errors[3] > errors[0] + 0.1


@pytest.mark.usefixtures("rendered")
def test_the_picture_with_and_without_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = walks([60], noise=0.4)
    for held_out in (data, None):
        found = measure_transitions(Walk(0.4), data, held_out, seed=0)
        draw_transitions(found, tmp_path / "transitions.png")
        assert (tmp_path / "transitions.png").stat().st_size > 5_000
    assert set(found) == {"spread"}
    assert "no validation data" in caplog.text


@pytest.mark.parametrize("within,allowed", [(0.2, 0), (0.8, 5)])
def test_steps_within_a_limit(within: float, allowed: int) -> None:
    # Half of the distance of two independent walks, and half a unit a step is what nothing changing misses as well.
    steps, errors = steps_within(Walk(0.4, within), walks([200] * 4, noise=0.4), most=5, seed=0)
    assert steps == allowed
    assert errors == pytest.approx([0.4 * np.sqrt(2) / 2 / np.sqrt(0.25 + 0.16)] * 5, rel=0.2)


def test_the_true_model_of_a_random_walk_is_better_than_any_other() -> None:
    data = walks([200] * 4, noise=0.4, move=0.0)
    found = {noise: steps_within(Walk(noise, within=1.0), data, most=5, seed=0) for noise in (0.0, 0.4, 1.6)}
    assert found[0.4] == (5, pytest.approx([np.sqrt(1 / 2)] * 5, rel=0.1))
    assert found[0.0][1] == pytest.approx([1.0] * 5)  # it is the one in which nothing changes
    for of_true, of_wild in zip(found[0.4][1], found[1.6][1], strict=True):
        assert of_true + 0.1 < of_wild


@pytest.mark.parametrize("ends_above,errors", [(np.inf, [0, 0, 0]), (-np.inf, [1, 1, 1])])
def test_a_trajectory_that_ends_too_early_stays_where_it_was(ends_above: float, errors: list[float]) -> None:
    model, data = Walk(0.0, within=0.9, ends_above=ends_above), walks([60] * 4, noise=0.0)
    allowed = 3 if errors[0] == 0 else 0
    assert steps_within(model, data, most=3, seed=0) == (allowed, pytest.approx(errors, abs=1e-5))
    # Where the task has ended there is no state to compare with.
    to_the_end = steps_within(model, walks([3] * 4, noise=0.0, goal=True), most=3, seed=0)
    assert to_the_end == (min(allowed, 2), pytest.approx(errors[:2], abs=1e-5))
    assert steps_within(model, walks([1] * 4, noise=0.0, goal=True), most=3, seed=0) == (0, [])


@pytest.mark.parametrize("goal", [False, True])
def test_wrong_ends(goal: bool) -> None:
    data = walks([5] * 200, noise=0.0, goal=goal)
    for chance, ends_above in ((0.0, np.inf), (1.0, -np.inf), (0.0228, 2.0)):
        found = measure_transitions(Walk(0.0, ends_above=ends_above), data, data, seed=0)
        ends, one_step = found["ends"]["sample"], found["ends_of_one_step"]["sample"]
        assert ends["false"]["1"] == pytest.approx(chance, abs=0.015)
        assert one_step["false"] == pytest.approx(chance, abs=0.005)
        by_then = 1 - (1 - chance) ** 5
        if goal:
            assert ends["false"]["5"] is None
            assert one_step["missed"] == pytest.approx(1 - chance, abs=0.005)
            assert ends["missed"] == {"1": None, "5": pytest.approx(1 - by_then, abs=0.03)}
        else:
            assert ends["false"]["5"] == pytest.approx(by_then, abs=0.03)
            assert one_step["missed"] is None
            assert ends["missed"] == {"1": None, "5": None}


def test_a_model_that_is_right_may_take_all_steps_and_one_that_knows_nothing_none() -> None:
    data = walks([60] * 4, noise=0.0)
    assert steps_within(Walk(0.0, within=0.1), data, most=5, seed=0)[0] == 5
    assert steps_within(Walk(2.0, within=0.9), data, most=5, seed=0)[0] == 0


def test_steps_are_no_more_than_the_trajectories_have() -> None:
    steps, errors = steps_within(Walk(0.0, within=0.1), walks([3] * 4, noise=0.0), most=5, seed=0)
    assert (steps, errors) == (3, pytest.approx([0.0] * 3, abs=1e-5))
