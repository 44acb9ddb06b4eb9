"""Units: what the data, the policy, the environment and the checkpoint make of actions and observations agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import deflow
from deflow.build import build_agent
from deflow.checkpoints import load_weights
from deflow.data.sources import own_data
from deflow.data.sources.custom import CustomSource
from deflow.data.sources.source import unless_one
from deflow.errors import UserError
from deflow.online import Collector
from deflow.pipeline import train
from deflow.policy import Policy
from deflow.types import Lookahead, Spec
from deflow.units import AS_THEY_ARE, Units
from tests.agents.tester import Acting
from tests.conftest import tiny_config
from tests.data.test_cases import ALL_KEYS, saved, walks

UNITS = Units((-2.0, 0.0), (2.0, 10.0), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0))


class Robot(gymnasium.Env):
    """Takes actions up to 2 and says what it was given."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(-2, 2, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return np.full(3, 5, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return np.full(3, 5 + self.steps, np.float32), float(action[0]), self.steps == 4, False, {"success": 1.0}


gymnasium.register("DeflowWideRobot-v0", entry_point="tests.test_units:Robot", max_episode_steps=10)


def test_there_and_back() -> None:
    actions = np.array([[-1.0, -1.0], [0.0, 0.5], [1.0, 1.0]], np.float32)
    assert UNITS.executed(actions).tolist() == [[-2.0, 0.0], [0.0, 7.5], [2.0, 10.0]]
    np.testing.assert_allclose(UNITS.decided(UNITS.executed(actions)), actions, atol=1e-6)
    assert UNITS.observed(np.array([3.0, 2.0, -5.0])).tolist() == [1.0, 0.0, -1.0]
    assert Units.of({key: value and list(value) for key, value in UNITS._asdict().items()}) == UNITS
    assert Units.of(None) == AS_THEY_ARE
    assert AS_THEY_ARE.executed(actions) is AS_THEY_ARE.decided(actions) is actions


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_policy_sees_and_executes_in_them(horizon: int) -> None:
    class Copies(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return observations[:, :2].repeat(1, horizon)

    policy = Policy(Copies(Spec(3, 2).chunked(horizon)), units=UNITS)
    assert policy.act(np.array([3.0, 2.0, 0.0])).tolist() == [2.0, 5.0]  # sees 1 and 0


def wide(folder: Path) -> str:
    columns = walks()
    return saved(folder, columns | {"actions": 2 * columns["actions"]})


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({}, None, None),  # the data's own, see below
        ({"env": "DeflowWideRobot-v0"}, (-2.0,) * 3, (2.0,) * 3),
        ({"action_range": [-4, 4]}, (-4.0,) * 3, (4.0,) * 3),
    ],
)
def test_the_range_of_actions(settings: dict[str, Any], low: Any, high: Any, tmp_path: Path) -> None:
    source = CustomSource(wide(tmp_path), ALL_KEYS, **settings)
    data, validation = source.load()
    assert validation is not None
    assert data.units == validation.units
    whole = torch.cat([part.actions[part.starts] for part in (data, validation)])
    expected = (low, high) if low else (tuple(whole.amin(0).tolist()), tuple(whole.amax(0).tolist()))
    assert (data.units.low, data.units.high) == expected
    batch, _ = data.batch(data.starts, Lookahead(0.9))
    executed = data.units.executed(batch.actions.numpy())
    np.testing.assert_allclose(executed, data.actions[data.starts].numpy(), atol=1e-4)


def test_actions_within_one_are_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert CustomSource(saved(tmp_path, walks()), ALL_KEYS).load()[0].units == AS_THEY_ARE
    assert CustomSource(wide(tmp_path / "b"), ALL_KEYS, action_range=None).load()[0].units == AS_THEY_ARE
    assert "actions outside what a policy decides; they are clipped" in caplog.text


@pytest.mark.parametrize("range_", [[2, -2], [1, 1]])
def test_a_range_that_is_none_is_refused(range_: list[float], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"action_range must be \[lowest, highest\], got"):
        CustomSource(wide(tmp_path), ALL_KEYS, action_range=range_).load()


def test_an_action_that_never_changes_is_decided_as_0() -> None:
    low, high = unless_one(np.array([-2.0, 3.0]), np.array([2.0, 3.0]))
    assert (low, high) == ((-2.0, 2.0), (2.0, 4.0))
    assert Units(low, high).decided(np.array([1.0, 3.0])).tolist() == [0.5, 0.0]


def test_standardised_observations(tmp_path: Path) -> None:
    data, _ = CustomSource(saved(tmp_path, walks()), ALL_KEYS, standardise=True).load()
    batch, next_rows = data.batch(data.starts, Lookahead(0.9))
    assert batch.observations.mean(0).abs().max() < 0.3
    assert (batch.observations.std(0) - 1).abs().max() < 0.3
    torch.testing.assert_close(batch.next_observations, data.observations(next_rows))


def test_what_never_changes_is_not_blown_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_data, "ROWS_AT_ONCE", 7)
    columns = walks()
    for name in ("observations", "next_observations"):
        columns[name][:, 0] = 5000.3  # which float32 does not hold, and the environment gives
    data, validation = CustomSource(saved(tmp_path, columns), ALL_KEYS, standardise=True).load()
    assert validation is not None
    states = torch.cat([part.states[part.starts] for part in (data, validation)]).double()
    np.testing.assert_allclose(data.units.mean, states.mean(0))
    np.testing.assert_allclose(data.units.std, [1.0, *states.std(0)[1:]])
    assert abs(data.units.observed(np.array([5000.3, 0.0, 0.0]))[0]) < 1e-3


def test_what_is_collected_is_in_the_units_of_the_data() -> None:
    class Half(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.full((len(observations), 3), 0.5)

    units = Units((-2.0,) * 3, (2.0,) * 3, (5.0,) * 3, (2.0,) * 3)
    collector = Collector(Robot, Half(Spec(3, 3)), 1, Lookahead(0.9), lambda reward: reward, seed=0, units=units)
    batches = [collector.step() for _ in range(4)]
    columns = [torch.cat(column)[:, 0].tolist() for column in zip(*(b[:2] for b in batches), strict=True)]
    assert columns == [[0.0, 0.5, 1.0, 1.5], [0.5] * 4]
    assert torch.cat([b.rewards for b in batches]).tolist() == [1.0] * 4  # the robot was given 1


def test_a_run_its_checkpoint_and_other_units(tmp_path: Path) -> None:
    path = wide(tmp_path)
    keys = [f"data.source.keys.{key}={key}" for key in ("timeouts", "next_observations")]
    overrides = ("experiment=custom", f"data.source.path={path}", *keys, "data.source.env=DeflowWideRobot-v0")
    summary = train(tiny_config(tmp_path, *overrides, "data.source.standardise=true"), tmp_path / "run")
    assert summary["eval/success"]["last"] == 1
    policy = deflow.load(tmp_path / "run")
    assert policy.units.low == (-2.0,) * 3
    assert policy.units.mean is not None
    assert np.abs(policy.act(np.zeros((64, 3)))).max() > 1
    config = tiny_config(tmp_path, *overrides)
    agent = build_agent(config.agent, Spec(3, 3))
    final = tmp_path / "run" / "checkpoints" / "0_joint" / "final.ckpt"
    load_weights(agent, final, "DeflowWideRobot-v0", policy.units)
    load_weights(agent, final, None, policy.units)
    with pytest.raises(UserError, match="not of another; ckpt_of_any_task=true takes it all the same"):
        load_weights(agent, final, "another", policy.units)
    with pytest.raises(UserError, match="was trained on other units"):
        load_weights(agent, final, "DeflowWideRobot-v0", AS_THEY_ARE)


def test_the_same_but_for_rounding() -> None:
    assert UNITS.mean is not None
    mean = tuple(value * (1 + 1e-12) for value in UNITS.mean)
    assert UNITS.is_close(UNITS._replace(mean=mean))
    others = (UNITS._replace(mean=tuple(value + 1 for value in mean)), UNITS._replace(low=None), AS_THEY_ARE)
    assert not any(UNITS.is_close(other) for other in others)
