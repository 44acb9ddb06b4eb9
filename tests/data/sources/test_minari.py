"""Minari's data sets: goals, dictionaries of observations, and environments that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import gymnasium_robotics
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.spaces.utils import flatten

from deflow.data.sources.minari import MinariSource
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.types import Spec
from tests.conftest import tiny_config
from tests.data.sources.minari_sets import episode, write_set

gymnasium.register_envs(gymnasium_robotics)

STEPS = 6
ACTIONS = Box(-1, 1, (2,))
CORRIDOR = [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]


def numbers(*shape: int) -> Box:
    return Box(-10, 10, shape, np.float64)


TASKS = Dict(kettle=numbers(2), burner=numbers(1))
SPACES: dict[str, gymnasium.Space] = {
    "kitchen": Dict(observation=numbers(4), achieved_goal=TASKS, desired_goal=TASKS),
    "without_goal": Dict(velocity=numbers(2), position=numbers(2, 2)),
    "images": Box(0, 255, (8, 8, 3), np.uint8),
    "text": Dict(observation=numbers(4), advice=Discrete(3)),
}


class Anything(gymnasium.Env):
    """Shows any observations of a space; the goal in them is drawn at every step, or given."""

    action_space = ACTIONS

    def __init__(self, space: str, goal: float | None = None) -> None:
        self.observation_space, self.goal = SPACES[space], goal

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observe(), 1.0, False, False, {}

    def observe(self) -> Any:
        self.seen = self.observation_space.sample()
        if self.goal is not None:
            self.seen["desired_goal"] = {key: part * 0 + self.goal for key, part in self.seen["desired_goal"].items()}
        return self.seen


gymnasium.register("DeflowAnything-v0", entry_point="tests.data.sources.test_minari:Anything", max_episode_steps=STEPS)


@pytest.fixture(autouse=True)
def own_folder_and_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("deflow.trust._trusted", ("tests",))


def write(space: str, goal: float | None = None, env_goal: float | None = None, has_env: bool = True) -> str:
    """A set of three episodes of `Anything`, of which the data and the environment may have goals of their own."""
    episodes = []
    for number in range(3):
        player = Anything(space, goal)
        seen = [player.reset(seed=number)[0], *(player.step(None)[0] for _ in range(STEPS))]
        episodes.append(episode(number, stacked(seen), np.zeros((STEPS, 2)), np.zeros(STEPS), np.zeros(STEPS)))
    if has_env:
        return write_set(episodes, gymnasium.make("DeflowAnything-v0", space=space, goal=env_goal))
    return write_set(episodes, observation_space=SPACES[space], action_space=ACTIONS)


def stacked(seen: list[Any]) -> Any:
    if isinstance(seen[0], dict):
        return {key: stacked([one[key] for one in seen]) for key in seen[0]}
    return np.array(seen)


def source(name: str, **settings: Any) -> MinariSource:
    return MinariSource(name, False, **settings)


@pytest.fixture
def pendulum() -> str:
    """Two episodes; the second ends its task."""
    env = gymnasium.make("Pendulum-v1")
    episodes = []
    for number in range(2):
        observations, actions, rewards = [env.reset(seed=number)[0]], [], []
        for _ in range(STEPS):
            actions.append(env.action_space.sample() / 2)  # half the torque limit of 2
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        ends = np.arange(STEPS) == (STEPS - 1 if number else STEPS)
        episodes.append(episode(number, np.array(observations), actions, rewards, ends))
    return write_set(episodes, env, "test/pendulum-v0", ref_min_score=-10.0, ref_max_score=-1.0)


def test_states(pendulum: str) -> None:
    states = source(pendulum)
    whole, _ = states.arrays()
    for number, theirs in enumerate(states._load()):
        arrays = {name: column[7 * number : 7 * number + 7] for name, column in whole.items()}
        assert list(arrays["valids"]) == [1] * 6 + [0]
        assert np.allclose(arrays["observations"], theirs.observations)
        assert np.allclose(arrays["rewards"][:6], theirs.rewards)
        assert np.allclose(arrays["actions"], np.append(theirs.actions, theirs.actions[-1:], axis=0))
        assert arrays["masks"][5] == 1 - theirs.terminations[5]
    shifted = source(pendulum, reward_shift=-1.0)
    torch.testing.assert_close(shifted.load()[0].rewards, states.load()[0].rewards - 1)
    assert shifted.label(0.5) == -0.5
    assert states.spec() == Spec(3, 1)
    units = states.load()[0].units  # of the torque's limit
    assert (units.low, units.high) == ((-2.0,), (2.0,))
    assert states.score(-1.0) == 100
    assert states.make_env().reset(seed=0)[0].shape == (3,)
    assert "not D4RL's" in states.protocol()["protocol"]


def test_standardised_observations(pendulum: str) -> None:
    train_part, _ = source(pendulum, standardise=True).load()
    plain, _ = source(pendulum).load()
    assert train_part.units[:2] == plain.units[:2] != (None, None)  # the actions' range stays
    mean, std = (torch.tensor(numbers) for numbers in train_part.units[2:4])
    seen = train_part.observations(train_part.starts)
    torch.testing.assert_close(seen, (plain.observations(plain.starts) - mean) / std)


def test_a_set_that_is_not_there() -> None:
    with pytest.raises(UserError, match="cannot load Minari's data set nothing/here-v0"):
        source("nothing/here-v0").prepare()


def test_it_trains_and_evaluates(pendulum: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "experiment=minari", f"data.source.dataset_id={pendulum}", "data.batch_size=4")
    summary = train(config, tmp_path / "run")
    assert summary["eval/score"]["last"] == pytest.approx(100 * (summary["eval/return"]["last"] + 10) / 9)


def test_it_trains_without_an_environment(pendulum: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, setting in ((pendulum, "null"), (write("without_goal", has_env=False), "dataset")):
        chosen = f"data.source.dataset_id={name}", f"data.source.env={setting}"
        config = tiny_config(tmp_path, "experiment=minari", "data.batch_size=4", *chosen)
        summary = train(config, tmp_path / name.replace("/", "_"))
        assert summary["evaluations"] == 0
        assert summary["protocol"] == "Minari data, without an environment"
    said = [record.message for record in caplog.records if "trained without evaluation" in record.message]
    assert said == ["test/own-v0 names no environment: it is trained without evaluation"]


@pytest.mark.parametrize(("space", "goal"), [("kitchen", "observation"), ("without_goal", "evaluation")])
def test_dictionaries_are_flattened_in_the_order_of_their_space(space: str, goal: str) -> None:
    dictionaries = source(write(space), goal=goal)
    stored = dictionaries._load().observation_space
    in_file = [
        flatten(stored, at_step(theirs.observations, step))
        for theirs in dictionaries._load()
        for step in range(STEPS + 1)
    ]
    assert sorted(dictionaries.arrays()[0]["observations"].tolist()) == sorted(np.array(in_file).tolist())
    env = dictionaries.make_env()
    shown, _ = env.reset(seed=5)
    assert np.array_equal(shown, flatten(stored, env.unwrapped.seen))
    shown, *_ = env.step(np.zeros(2))
    assert np.array_equal(shown, flatten(stored, env.unwrapped.seen))
    assert dictionaries.spec() == Spec(len(shown), 2)


def at_step(observations: Any, step: int) -> Any:
    if isinstance(observations, dict):
        return {key: at_step(part, step) for key, part in observations.items()}
    return observations[step]


def test_the_only_goal_is_not_shown() -> None:
    one_goal = source(write("kitchen", goal=2.0, env_goal=2.0))
    assert one_goal.spec() == Spec(3 + 4, 2)
    assert one_goal.arrays()[0]["observations"].shape[1] == 7
    assert one_goal.make_env().reset()[0].shape == (7,)


def test_goals_that_are_not_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"goals in test/own-v0 differ, .*set data\.source\.goal=observation"):
        source(write("kitchen", has_env=False)).load()
    for other in (3.0, None):
        with pytest.raises(UserError, match="environment of test/own-v0 has other goals than the data"):
            source(write("kitchen", goal=2.0, env_goal=other)).load()
    with pytest.raises(UserError, match="has no desired_goal"):
        source(write("without_goal"), goal="observation").prepare()


def maze(cells: list[list[Any]], **settings: Any) -> str:
    """A set of random walks in a maze, whose task goes on at the goal."""
    env = gymnasium.make("PointMaze_UMaze-v3", maze_map=cells, **settings)
    episodes = []
    for number in range(2):
        seen = [env.reset(seed=number)[0], *(env.step(np.zeros(2))[0] for _ in range(STEPS))]
        episodes.append(episode(number, stacked(seen), np.zeros((STEPS, 2)), np.zeros(STEPS), np.zeros(STEPS)))
    return write_set(episodes, env, ref_min_score=0.0, ref_max_score=100.0)


def test_a_maze_is_evaluated_with_one_goal_where_it_ends_within_the_registered_steps() -> None:
    walks = source(maze(CORRIDOR, max_episode_steps=1_000_000))
    env = walks.make_env()
    for seed in range(3):
        env.reset(seed=seed)
        assert env.unwrapped.goal.tolist() == [0.5, 0.0]
    assert [env.step(np.array([-1.0, 0.0]))[3] for _ in range(300)] == [False] * 299 + [True]
    env.reset(seed=0)
    ends = [env.step(np.array([1.0, 0.0]))[2:] for _ in range(40)]
    assert (True, False, {"success": True}) in ends
    assert "ends at its goal, at [0.5, 0.0]" in walks.protocol()["protocol"]
    assert walks.score(1.0) is None  # the reference returns are of a task that goes on


def test_a_maze_with_several_goals_is_refused_unless_they_are_shown() -> None:
    name = maze([[1, 1, 1, 1, 1], [1, "r", "g", "g", 1], [1, 1, 1, 1, 1]])
    with pytest.raises(UserError, match=r"draws its goal from 2 cells: set data\.source\.goal=observation"):
        source(name).load()
    assert source(name, goal="observation").load()[0].states.shape[1] == 8


def test_an_episode_without_its_last_observation_is_named() -> None:
    none = np.zeros((STEPS, 2)), np.zeros(STEPS), np.zeros(STEPS)
    episodes = [episode(number, np.zeros((STEPS + 1 - number, 3)), *none) for number in range(2)]
    name = write_set(episodes, observation_space=numbers(3), action_space=ACTIONS)
    with pytest.raises(UserError, match="episode 1 has 6 observations for 6 actions; it needs 7"):
        source(name).load()


@pytest.mark.parametrize(
    ("space", "message"), [("images", r"images of shape \(8, 8, 3\)"), ("text", "observations/advice")]
)
def test_observations_that_are_no_states_are_refused(space: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.* not read"):
        source(write(space, has_env=False)).prepare()


def test_discrete_actions_are_refused() -> None:
    none = np.zeros(STEPS, int), np.zeros(STEPS), np.zeros(STEPS)
    name = write_set(
        [episode(0, np.zeros((STEPS + 1, 3)), *none)], observation_space=numbers(3), action_space=Discrete(4)
    )
    with pytest.raises(UserError, match=r"Discrete\(4\) are not read"):
        source(name).spec()


def test_an_environment_of_other_observations_is_refused() -> None:
    wrong = source(write("without_goal"))
    wrong._load()._eval_env_spec.kwargs["space"] = "kitchen"
    with pytest.raises(UserError, match=r"other observations than the data.*data\.source\.env=null"):
        wrong.make_env()
