"""Units: what the data, the policy, the environment and the checkpoint make of actions and observations agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hydra.utils import instantiate
from omegaconf import OmegaConf

import deflow
from deflow.agents.algorithm import Traits
from deflow.build import build_agent, take_units
from deflow.checkpoints import begin_with, load_to_begin_with
from deflow.collecting import Collector
from deflow.data.memory.transitions import Transitions
from deflow.data.sources import source as sources
from deflow.data.sources.custom import CustomSource
from deflow.data.sources.source import compact, unless_one
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.policy import Policy
from deflow.types import Lookahead, Spec
from deflow.units import AS_THEY_ARE, Units, scale_and_shift
from tests.agents.tester import Acting
from tests.conftest import CKPT, tiny_config
from tests.data.test_cases import ALL_KEYS, saved, walks

SPEC = Spec(3, 2)
UNITS = Units((-2.0, 0.0), (2.0, 10.0), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), (4.0, -2.0))


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
    assert Units.of({key: value and list(value) for key, value in UNITS._asdict().items()}, SPEC) == UNITS
    assert UNITS.learned(0.75) == 1.0
    assert UNITS.learned(torch.tensor([0.0, 1.0])).tolist() == [-2.0, 2.0]
    assert Units.of(None, SPEC) == AS_THEY_ARE
    before_rewards = {key: value for key, value in UNITS._asdict().items() if key != "reward"}  # an older checkpoint's
    assert Units.of(before_rewards, SPEC) == UNITS._replace(reward=None) == UNITS.with_rewards(1.0, 0.0)
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


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_standardised_observations(scale: float, tmp_path: Path) -> None:
    columns = walks()
    for name in ("observations", "next_observations"):
        columns[name] = scale * columns[name]
    data, _ = CustomSource(saved(tmp_path, columns), ALL_KEYS, standardise=True).load()
    batch, next_rows = data.batch(data.starts, Lookahead(0.9))
    assert batch.observations.mean(0).abs().max() < 0.3
    assert (batch.observations.std(0) - 1).abs().max() < 0.3
    torch.testing.assert_close(batch.next_observations, data.observations(next_rows))


def test_what_never_changes_is_not_blown_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 7)
    columns = walks()
    for name in ("observations", "next_observations"):
        columns[name][:, 0] = 5000.3  # which float32 does not hold, and the environment gives
    data, validation = CustomSource(saved(tmp_path, columns), ALL_KEYS, standardise=True).load()
    assert validation is not None
    states = torch.cat([part.states[part.starts] for part in (data, validation)]).double()
    np.testing.assert_allclose(data.units.mean, states.mean(0))
    np.testing.assert_allclose(data.units.std, [1.0, *states.std(0)[1:]])
    assert abs(data.units.observed(np.array([5000.3, 0.0, 0.0]))[0]) < 1e-3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_what_arithmetic_leaves_has_no_units(scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 7)
    columns, rng = walks(), np.random.default_rng(0)
    for name in ("observations", "next_observations"):
        rows = len(columns[name])
        rounded = np.float32(5000.3) * (1 + 2.0**-24 * rng.choice([-1, 1], rows))
        left = 1e-7 * min(scale, 1.0) * rng.normal(size=rows)
        columns[name] = np.column_stack([rounded, left, scale * columns[name]]).astype(np.float32)
    data, _ = CustomSource(saved(tmp_path, columns), ALL_KEYS, standardise=True).load()
    assert data.units.std is not None
    assert data.units.std[:2] == (1.0, 1.0)
    assert min(data.units.std[2:]) > 0.1 * scale


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
    begin_with(agent, load_to_begin_with(final, "DeflowWideRobot-v0", policy.units), final)
    load_to_begin_with(final, None, policy.units)
    with pytest.raises(UserError, match="not of another; ckpt_of_any_task=true takes it all the same"):
        load_to_begin_with(final, "another", policy.units)
    with pytest.raises(UserError, match="was trained on other units"):
        load_to_begin_with(final, "DeflowWideRobot-v0", AS_THEY_ARE)


@pytest.mark.parametrize(
    ("ours", "found"),
    [("auto", [-7.0, 0.0]), ([-7.0 + 1e-12, 0.0], [-7.0 + 1e-12, 0.0]), ([-7.1, 0.0], None)],
)
def test_units_of_weights(ours: Any, found: Any) -> None:
    taught = {"spec": list(Spec(5, 3)), "config": {"agent": {"critic": {"value_range": [-7.0, 0.0]}}}}
    settings = OmegaConf.create({"critic": {"value_range": ours}})
    take_units(settings, taught, Spec(6, 3))  # whose weights do not fit
    assert settings == {"critic": {"value_range": ours}}
    if found is None:
        with pytest.raises(UserError, match=r"agent\.critic\.value_range is not that of ckpt"):
            take_units(settings, taught, Spec(5, 3))
    else:
        take_units(settings, taught, Spec(5, 3))
        assert settings.critic.value_range == found


def test_the_same_but_for_rounding() -> None:
    assert UNITS.mean is not None
    mean = tuple(value * (1 + 1e-12) for value in UNITS.mean)
    assert UNITS.is_close(UNITS._replace(mean=mean))
    others = (UNITS._replace(mean=tuple(value + 1 for value in mean)), UNITS._replace(low=None), AS_THEY_ARE)
    others += (UNITS.with_rewards(1.0, 0.0), UNITS.with_rewards(4.0, -1.0))
    assert not any(UNITS.is_close(other) for other in others)


def two_ways(scale: float, shift: float) -> list[Transitions]:
    """The same walks with rewards that are converted when they are drawn, and with others in the columns."""
    columns = walks()
    arrays = compact(
        *(columns[name] for name in ("observations", "actions", "rewards")),
        1.0 - columns["terminals"],
        columns["terminals"].astype(bool) | columns["timeouts"].astype(bool),
        columns["next_observations"],
    )
    converted = Transitions.from_compact(arrays, "converted")
    rewards = np.where(arrays["valids"] > 0, scale * arrays["rewards"] + shift, 0)
    return [
        replace(converted, units=AS_THEY_ARE.with_rewards(scale, shift)),
        Transitions.from_compact(arrays | {"rewards": rewards}, "written"),
    ]


@pytest.mark.parametrize(("scale", "shift"), [(10.0, -5.0), (100.0, 0.0), (1.0, -1.0)])
@pytest.mark.parametrize("span", [Lookahead(0.9), Lookahead(0.9, 3), Lookahead(0.9, 3, 3)])
def test_rewards_are_converted_before_they_are_summed(span: Lookahead, scale: float, shift: float) -> None:
    converted, written = (data.with_returns(0.9) for data in two_ways(scale, shift))
    rows = converted.chunk_starts(span.horizon)
    (ours, _), (theirs, _) = converted.batch(rows, span), written.batch(rows, span)
    torch.testing.assert_close(ours.rewards, theirs.rewards)
    torch.testing.assert_close(ours.returns, theirs.returns)
    assert torch.equal(ours.discounts, theirs.discounts)


def test_what_is_collected_is_rewarded_as_the_data() -> None:
    class Half(Acting):
        traits = Traits(reads_returns=True)

        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.full((len(observations), 3), 0.5)

    units = Units((-2.0,) * 3, (2.0,) * 3).with_rewards(10.0, -5.0)
    collector = Collector(Robot, Half(Spec(3, 3)), 1, Lookahead(0.9, 2), lambda reward: reward - 0.25, 0, units=units)
    batch = [collector.step() for _ in range(4)][-1]  # the robot is given 1, which the data call 0.75
    assert batch.rewards.tolist() == pytest.approx([2.5 + 0.9 * 2.5] * 3 + [2.5])
    assert batch.returns is not None
    assert batch.returns.tolist() == pytest.approx([2.5 * sum(0.9**k for k in range(n)) for n in (4, 3, 2, 1)])
    assert collector.finished[0].episode_return == 4.0  # what is said of an episode stays the environment's


@pytest.mark.usefixtures("short_episodes")
def test_seeds_learn_from_scaled_rewards(point_data: Path, tmp_path: Path) -> None:
    overrides = ("experiment=pointmaze", "data.reward_scale=10", "data.reward_shift=-5", "agent/critic=flow", "seeds=2")
    summary = train(tiny_config(point_data, *overrides, "data.discount=0.9"), tmp_path)
    assert summary["units"]["reward"] == (10.0, -5.0)
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert config.agent.critic.value_range == pytest.approx([-150.0, 0.0])  # a step costs 1, which is 15, for ever


def test_rewards_are_standardised_by_the_training_data(point_data: Path) -> None:
    overrides = ("experiment=pointmaze", "data.reward_scale=auto", "data.reward_shift=0.5")
    data = instantiate(tiny_config(point_data, *overrides).data)
    plain = instantiate(tiny_config(point_data, "experiment=pointmaze").data)
    for each in (data, plain):
        each.prepare_data()
        each.source.label = lambda rewards: rewards + np.arange(len(rewards)) % 7
        each.setup()
    rows = plain.transitions.has_successor
    learned, labelled = data.transitions.units.learned(data.transitions.rewards)[rows], plain.transitions.rewards[rows]
    assert (learned.mean().item(), learned.std(correction=0).item()) == pytest.approx((0.5, 1.0), abs=1e-5)
    torch.testing.assert_close(learned, (labelled - labelled.mean()) / labelled.std(correction=0) + 0.5)
    assert data.validation.units == data.transitions.units


def test_rewards_that_are_all_the_same_cannot_be_standardised() -> None:
    assert scale_and_shift(2.0, 1.0, np.zeros(3)) == (2.0, 1.0)
    with pytest.raises(UserError, match="all rewards are the same"):
        scale_and_shift("auto", 0.0, np.full(3, -1.0, np.float32))


@pytest.mark.usefixtures("short_episodes")
def test_weights_of_other_rewards_are_refused(
    finished_run: Callable[..., Path], point_data: Path, tmp_path: Path
) -> None:
    ckpt = f"ckpt='{finished_run('data.reward_scale=10') / CKPT}'"
    overrides = ("experiment=pointmaze", ckpt, "updates=2", "data.reward_scale=10")
    assert train(tiny_config(point_data, *overrides), tmp_path / "same")["updates"] == 2
    with pytest.raises(UserError, match="other units of actions, observations or rewards"):
        train(tiny_config(point_data, *overrides, "data.reward_shift=1"), tmp_path / "other")
