"""The data card: counts, and the known faults each said in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deflow.data.measures.card import describe
from deflow.inspection import inspect
from tests.conftest import compose_config

ROWS = 1005


def arrays(trajectories: int = 5, length: int = 200, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """Random walks with a reward at the end of each."""
    rng = np.random.default_rng(0)
    starts = 500 * rng.normal(size=(trajectories, 1, 2))
    walks = starts + rng.normal(size=(trajectories, length + 1, 2)).cumsum(1)
    rewards = np.tile(np.arange(length + 1) == length - 1, trajectories) - 1.0
    columns = {
        "observations": walks.reshape(-1, 2),
        "actions": rng.uniform(-0.9, 0.9, (trajectories * (length + 1), 3)),
        "rewards": rewards,
        "masks": -rewards,
        "valids": np.tile(np.arange(length + 1) < length, trajectories).astype(float),
    }
    return columns | changes


def test_a_sound_data_set() -> None:
    card = describe(arrays())
    assert card["warnings"] == []
    assert (card["transitions"], card["trajectories"], card["task_ends"]) == (1000, 5, 5)
    assert card["trajectory_length"] == {"min": 200, "mean": 200, "max": 200}
    assert card["rewards"] == pytest.approx({"min": -1, "mean": -0.995, "max": 0, "distinct": 2})
    assert card["rows_not_finite"] == card["jumps_inside_trajectories"] == card["repeated_transitions"] == 0


def _with(column: str, row: int, value: float) -> dict[str, np.ndarray]:
    changed = arrays()[column]
    changed[row] = value
    return {column: changed}


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"masks": np.ones(ROWS)}, "masks are all 1"),
        ({"rewards": np.full(ROWS, -1.0)}, "all rewards are -1"),
        ({"valids": np.ones(ROWS)}, "terminals are missing or misplaced"),
        ({"valids": np.arange(ROWS) % 2.0}, "every trajectory has one transition"),
        (_with("actions", 3, 2.0), "1 rows have actions outside"),
        ({"actions": np.ones((ROWS, 3))}, "100% of the action components are at their limit"),
        (_with("observations", 3, np.nan), "1 rows have NaN"),
        ({"observations": np.ones((ROWS, 2)), "actions": np.zeros((ROWS, 3))}, "100% of the transitions are repeated"),
    ],
)
def test_every_fault_is_named(change: dict, warning: str) -> None:
    assert any(warning in line for line in describe(arrays(**change))["warnings"])


@pytest.mark.usefixtures("rendered")
def test_inspect_writes_the_card_and_a_policys_variance(
    finished_run: Callable[..., Path], point_data: Path, tmp_path: Path
) -> None:
    ckpt = finished_run() / "checkpoints" / "0_joint" / "final.ckpt"
    overrides = ("task=pointmaze_medium", f"paths.data={point_data}", f"out={tmp_path}", f"ckpt={ckpt}")
    rewards = ("data.reward_scale=10", "data.reward_shift=-5")
    result = inspect(compose_config(*overrides, *rewards, "samples=4", config_name="inspect_data"))
    name = "pointmaze-medium-navigate-v0"
    assert json.loads((tmp_path / f"{name}.json").read_text())["name"] == name
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert len(result["card"]["task_ends_by_task"]) == 5
    assert result["card"]["rewards"]["mean"] == -15  # each step costs 1; as they are learned from
    variances = result["action_variance"]
    assert set(variances) == {"data", "policy", "proposal"}
    assert all(variance["mean"] > 0 for variance in variances.values())
