"""What the data decide of an agent's settings: units that fit, however small the numbers are, and the values' range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from deflow.build import decide, path_statistics, state_statistics, step_statistics
from deflow.data.memory.transitions import Transitions
from tests.conftest import compose_config

LENGTH = 50


def wandering(scale: float = 1.0, offset: float = 0.0) -> Transitions:
    """Trajectories of three numbers: one wanders, one counts the steps in thousandths, one stays."""
    rng = np.random.default_rng(0)
    moves = rng.uniform(-0.1, 0.1, (4, LENGTH))
    count = np.arange(LENGTH) / 1000
    each = [np.stack([walk.cumsum(), count, np.zeros(LENGTH)], 1) for walk in moves]
    ends = (np.arange(4 * LENGTH) + 1) % LENGTH == 0
    columns = {
        "observations": (scale * np.concatenate(each) + offset).astype(np.float32),
        "actions": moves.reshape(-1, 1).astype(np.float32),
        "rewards": np.zeros(4 * LENGTH, np.float32),
        "masks": np.ones(4 * LENGTH, np.float32),
        "valids": 1 - ends.astype(np.float32),
    }
    return Transitions.from_compact(columns, "wandering")


@pytest.mark.parametrize(("scale", "offset"), [(1e-5, 0.0), (1.0, 0.0), (1e5, 0.0), (1.0, 10.0), (1.0, 1000.0)])
def test_units_of_the_statistics_are_those_of_the_data(scale: float, offset: float) -> None:
    found, plain = step_statistics(wandering(scale, offset)), step_statistics(wandering())
    # Single precision has some three digits left of a change beside 1000.
    for name in ("observation_std", "change_std"):
        assert found[name][:2] == pytest.approx([scale * number for number in plain[name][:2]], rel=0.2)  # type: ignore[literal-required]
    assert found["observation_std"][2] == 1  # it does not vary
    assert found["change_std"][1:] == pytest.approx([scale * 1e-3, 1], rel=0.2)  # one is always the same, one is none


def test_units_of_paths_are_those_of_the_data() -> None:
    found, plain = path_statistics(wandering(1e-5), 2), path_statistics(wandering(), 2)
    assert plain["std"][1::3] == pytest.approx([1e-3, 2e-3], rel=1e-3)
    for number in (0, 1, 3, 4):
        assert found["std"][number] == pytest.approx(1e-5 * plain["std"][number], rel=1e-3)
    assert found["std"][2::3] == [1, 1]


def test_what_arithmetic_leaves_is_no_variation() -> None:
    data = wandering()
    data.states[:, 2] = 1e-8 * torch.randn(len(data.states))
    assert step_statistics(data)["change_std"][2] == state_statistics(data)["observation_std"][2] == 1


@pytest.mark.parametrize(
    ("rewards", "masks", "expected"),
    [
        ([-1, -1, 0, -1], [1, 1, 0, 1], [-10, 0]),
        ([0, 0, 1, 0], [1, 1, 0, 1], [0, 1]),  # earned once: the task ends with it
        ([0, 1, 1, -3], [1, 1, 0, 0], [-3, 10]),
        ([2, 2, 2, 2], [1, 1, 1, 1], [0, 20]),
    ],
)
def test_the_range_of_values(rewards: list[float], masks: list[float], expected: list[float]) -> None:
    columns = {
        "observations": np.zeros((5, 1), np.float32),
        "actions": np.zeros((5, 1), np.float32),
        "rewards": np.array([*rewards, 0], np.float32),
        "masks": np.array([*masks, 1], np.float32),
        "valids": np.array([1, 1, 1, 1, 0], np.float32),
    }
    config = compose_config("experiment=pointmaze", "agent/critic=floq", "data.discount=0.9")
    OmegaConf.set_struct(config, False)
    decide(config, Transitions.from_compact(columns, "four steps"))
    assert config.agent.critic.value_range == pytest.approx(expected)
