"""One contract for every source: what is played in its environment online is what its data of the same play hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium_robotics
import h5py
import numpy as np
import pyarrow
import pytest
import torch
from hydra.utils import instantiate
from pyarrow import parquet

from deflow.collecting import Collector
from deflow.data.sources.custom import CustomSource
from deflow.data.sources.d4rl import D4RLSource
from deflow.data.sources.lerobot import LeRobotSource
from deflow.data.sources.minari import MinariSource
from deflow.data.sources.ogbench import OGBenchSource
from deflow.data.sources.robomimic import RobomimicSource
from deflow.data.sources.source import Source
from deflow.evaluation.rollout import take_seat
from deflow.seeding import fold_seed
from deflow.types import Batch, Lookahead, Spec
from tests.agents.tester import Acting
from tests.conftest import compose_config
from tests.data.sources.minari_sets import episode, write_set

SEED, EPISODES, SPAN = 3, 6, Lookahead(0.9)
COMPARED = ("observations", "actions", "rewards", "discounts", "next_observations")
Columns = dict[str, np.ndarray]
CORRIDOR = [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]


class Pushing(Acting):
    """Pushes along the first axis, a little differently at every step."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.steps = 0

    def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return 0.8 * torch.cos(1.5 * torch.arange(self.spec.action_dim) + 0.1 * np.sin(self.steps))[None]


class Line(gymnasium.Env):
    """A point that starts near the origin; the task ends at 0.3 on the first axis."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=3).astype(np.float32) / 2
        return self.place, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = self.place + np.append(action, 0).astype(np.float32) / 8
        return self.place, -float(np.abs(self.place).sum()), bool(self.place[0] > 0.3), False, {}


gymnasium.register("DeflowLine-v0", entry_point="tests.data.sources.test_contract:Line", max_episode_steps=6)


class AtGoal(gymnasium.Wrapper):
    """Brings goal and robot together before the fifth step of every second episode."""

    def __init__(self, env: gymnasium.Env, bring_together: Callable[[Any], None]) -> None:
        super().__init__(env)
        self.bring_together = bring_together
        self.episodes = self.steps = 0

    def reset(self, **kwargs: Any) -> Any:
        self.episodes, self.steps = self.episodes + 1, 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 5 and self.episodes % 2:
            self.bring_together(self.env.unwrapped)
        return super().step(action)


@dataclass
class Played:
    """An episode as an environment gave it."""

    observations: list[Any] = field(default_factory=list)  # one more than there are steps
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminals: list[bool] = field(default_factory=list)


def collect(source: Source, spec: Spec) -> tuple[Columns, list[int]]:
    """What the online stage makes of `EPISODES` episodes, and their lengths."""
    collector = Collector(source.make_env, Pushing(spec), 1, SPAN, source.label, SEED)
    batches = []
    while len(collector.finished) < EPISODES:
        batches.append(collector.step())
    collector.close()
    return joined(batches), [episode.length for episode in collector.finished]


def in_the_data(source: Source) -> Columns:
    return joined([part.batch(part.starts, SPAN)[0] for part in source.load()])


def joined(batches: list[Batch]) -> Columns:
    return {name: torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in COMPARED}


def play_again(env: gymnasium.Env, actions: np.ndarray, lengths: list[int]) -> list[Played]:
    """The same episodes as `env` gives them."""
    episodes, rest = [], iter(actions)
    for number, length in enumerate(lengths, start=1):
        seat = take_seat(env, fold_seed(SEED, "online", 0), number)
        episode = Played([seat.observation])
        for action in (next(rest) for _ in range(length)):
            observation, reward, terminated, *_ = env.step(action)
            episode.observations.append(observation)
            episode.actions.append(action)
            episode.rewards.append(float(reward))
            episode.terminals.append(terminated)
        episodes.append(episode)
    env.close()
    return episodes


def as_set(transitions: Columns) -> set[tuple[float, ...]]:
    rows = [column.reshape(len(transitions["rewards"]), -1).copy() for column in transitions.values()]
    rows[-1][transitions["discounts"] == 0] = 0  # the state after a true end does not matter
    return set(map(tuple, np.concatenate(rows, axis=1).tolist()))


def assert_as_collected(source: Source, collected: Columns) -> None:
    assert {0.0, np.float32(0.9)} == set(collected["discounts"])  # some ended at the goal, some at the time limit
    assert len(set(collected["rewards"])) > 1
    assert as_set(in_the_data(source)) == as_set(collected)


def columns_of(episodes: list[Played]) -> Columns:
    """One row a transition."""
    ends = [np.arange(len(e.actions)) == len(e.actions) - 1 for e in episodes]
    columns: dict[str, list[Any]] = {
        "observations": [e.observations[:-1] for e in episodes],
        "next_observations": [e.observations[1:] for e in episodes],
        "actions": [e.actions for e in episodes],
        "rewards": [e.rewards for e in episodes],
        "terminals": [e.terminals for e in episodes],
        "timeouts": [end & ~np.array(e.terminals) for end, e in zip(ends, episodes, strict=True)],
    }
    return {name: np.concatenate([np.asarray(part) for part in parts]) for name, parts in columns.items()}


def write_hdf5(path: Path, columns: Columns) -> None:
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file[key] = column


@pytest.mark.parametrize("kind", ["npz", "hdf5", "folder"])
def test_own_data(kind: str, tmp_path: Path) -> None:
    keys = {key: key for key in (*COMPARED, "terminals", "timeouts") if key != "discounts"}
    path = tmp_path if kind == "folder" else tmp_path / f"own.{kind}"
    source = CustomSource(str(path), keys, env="DeflowLine-v0")
    collected, lengths = collect(source, Spec(3, 2))
    episodes = play_again(gymnasium.make("DeflowLine-v0"), collected["actions"], lengths)
    if kind == "hdf5":
        write_hdf5(path, columns_of(episodes))
    elif kind == "npz":
        np.savez(path, **columns_of(episodes))
    else:
        for name, some in (("a", episodes[:3]), ("b", episodes[3:])):
            np.savez(path / name, **columns_of(some))
    assert_as_collected(source, collected)


def test_robomimic(tmp_path: Path) -> None:
    source = RobomimicSource(str(tmp_path / "low_dim.hdf5"), observation_keys=["place"], env="DeflowLine-v0")
    collected, lengths = collect(source, Spec(3, 2))
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        for number, e in enumerate(play_again(source.make_env(), collected["actions"], lengths)):
            columns = {"actions": e.actions, "rewards": e.rewards, "dones": np.array(e.terminals, int)}
            columns |= {"obs/place": e.observations[:-1], "next_obs/place": e.observations[1:]}
            for name, column in columns.items():
                file[f"data/demo_{number}/{name}"] = column
    assert_as_collected(source, collected)


def test_lerobot(tmp_path: Path) -> None:
    source = LeRobotSource(str(tmp_path), env="DeflowLine-v0")
    collected, lengths = collect(source, Spec(3, 2))
    episodes = play_again(source.make_env(), collected["actions"], lengths)
    columns = {
        "observation.state": [list(o) for e in episodes for o in e.observations[:-1]],
        "action": [list(action) for e in episodes for action in e.actions],
        "next.reward": [reward for e in episodes for reward in e.rewards],
        "next.done": [done for e in episodes for done in e.terminals],
        "episode_index": [number for number, n in enumerate(lengths) for _ in range(n)],
        "frame_index": [step for n in lengths for step in range(n)],
    }
    sizes = {"observation.state": 3, "action": 2}
    features = {name: {"dtype": "float32", "shape": [sizes.get(name, 1)]} for name in columns}
    for folder in ("data/chunk-000", "meta"):
        (tmp_path / folder).mkdir(parents=True)
    parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "chunk-000" / "file-000.parquet")
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "features": features}))
    found = in_the_data(source)
    assert as_set(found) < as_set(collected)  # without next observations the last row of a cut episode is a successor
    assert len(found["rewards"]) == len(collected["rewards"]) - (EPISODES - (found["discounts"] == 0).sum())
    assert 0 in found["discounts"]


def meet(monkeypatch: pytest.MonkeyPatch, kind: type[Source], bring_together: Callable[[Any], None]) -> None:
    """Shorten the episodes of such sources, and let robot and goal meet in every second one."""
    make_env = kind.make_env
    monkeypatch.setattr(
        kind, "make_env", lambda source: AtGoal(gymnasium.wrappers.TimeLimit(make_env(source), 8), bring_together)
    )


def test_ogbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bring_together(env: Any) -> None:  # a step away: the step after is labelled, by the state that it leaves
        env.set_xy(np.subtract(env.cur_goal_xy, (1.05, 0.0)))

    meet(monkeypatch, OGBenchSource, bring_together)
    path = tmp_path / "point.npz"
    config = compose_config("experiment=pointmaze", f"data.source.path={path}")
    source = instantiate(config.data).source
    collected, lengths = collect(source, source.spec())
    episodes = play_again(source.make_env(), collected["actions"], lengths)
    states = np.concatenate([e.observations for e in episodes])
    columns = {"observations": states, "qpos": states, "qvel": np.zeros_like(states)}
    columns["actions"] = np.concatenate([[*e.actions, e.actions[-1]] for e in episodes])
    columns["terminals"] = np.concatenate([np.arange(n + 1) == n for n in lengths])
    for name in ("point.npz", "point-val.npz"):
        np.savez(tmp_path / name, **columns)
    assert_as_collected(source, collected)


def test_d4rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bring_together(env: Any) -> None:
        env.goal = env.data.qpos[:2].copy()

    meet(monkeypatch, D4RLSource, bring_together)
    source = D4RLSource("antmaze-umaze-v2", str(tmp_path / "antmaze.hdf5"), "", None)
    collected, lengths = collect(source, source.spec())
    columns = columns_of(play_again(source.make_env(), collected["actions"], lengths))
    assert set(columns["rewards"]) == {0.0, 1.0}
    columns["timeouts"] |= columns["terminals"]  # an ant that has arrived may go on
    write_hdf5(tmp_path / "antmaze.hdf5", columns)
    found = in_the_data(source)
    assert as_set(found) < as_set(collected)  # without next observations the last row of a cut episode is a successor
    assert set(found["rewards"]) == {-1.0, 0.0}
    assert 0 in found["discounts"]


def stacked(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: stacked([observation[key] for observation in observations]) for key in observations[0]}
    return np.array(observations)


def write_minari(env: gymnasium.Env, episodes: list[Played]) -> str:
    parts = [(stacked(e.observations), e.actions, e.rewards, e.terminals) for e in episodes]
    return write_set([episode(number, *part) for number, part in enumerate(parts)], env)


def assert_minari_as_collected(make_env: Callable[[], gymnasium.Env], **settings: Any) -> None:
    name = write_minari(make_env(), play_again(make_env(), np.zeros((2, 2), np.float32), [1, 1]))
    source = MinariSource(name, False, reward_shift=-1.0, **settings)
    collected, lengths = collect(source, source.spec())
    write_minari(make_env(), play_again(make_env(), collected["actions"], lengths))
    assert_as_collected(MinariSource(name, False, reward_shift=-1.0, **settings), collected)


@pytest.mark.parametrize("goal", ["evaluation", "observation"])
@pytest.mark.parametrize("reward_type", ["sparse", "dense"])
def test_minari_maze(goal: str, reward_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_env() -> gymnasium.Env:  # as the data were collected: the task goes on, the goal is drawn at every reset
        settings: dict[str, Any] = {"maze_map": CORRIDOR, "reward_type": reward_type, "max_episode_steps": 22}
        gymnasium.register_envs(gymnasium_robotics)
        return gymnasium.make("PointMaze_UMaze-v3", **settings)

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert_minari_as_collected(make_env, goal=goal)


def test_minari_without_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("deflow.trust._trusted", ("tests",))
    assert_minari_as_collected(lambda: gymnasium.make("DeflowLine-v0"))
