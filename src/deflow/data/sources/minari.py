"""Minari's data sets, local or downloaded with its own client."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.columns import Arrays
from deflow.data.sources.source import Reward, Source, unless_one
from deflow.data.sources.view import (
    DESIRED,
    View,
    Viewed,
    as_row,
    check_states,
    flatten,
    has_goal,
    is_maze,
    shapes,
    without_goal,
)
from deflow.errors import UserError
from deflow.extras import require
from deflow.ranges import Seed
from deflow.trust import check_environment_spec
from deflow.types import Spec
from deflow.units import Units

log = logging.getLogger(__name__)

ENVIRONMENTS = ("env_spec", "eval_env_spec")  # of the data and of the evaluation, in a data set's metadata
GOAL_RESETS = 3  # of the environment, to see whether its goal stays where it is
SAME_GOAL = 1e-5  # difference of goals that are the same, relative


@dataclass
class MinariSource(Source):
    """A Minari data set.

    Its D4RL family was collected anew in other simulators: a score here is Minari's, never D4RL's. Observations that
    are dictionaries are flattened in the order of their space. Mazes are what D4RL made of them: a task with one goal,
    which ends there; the steps of the data are labelled for it by the rules of the evaluation environment.

    Args:
        dataset_id: such as `D4RL/antmaze/umaze-v1` or `D4RL/pen/human-v2`.
        download: whether to download a data set that is not on disk.
        reward_shift: added to every reward; -1 makes each step of a sparse task cost 1, as in the papers' antmaze.
        goal: of data that say which goal was to be reached: `evaluation` is the evaluation environment's only one, not
            shown to the agent; `observation` shows each state's own. Both are checked.
        standardise: whether networks see observations less the data's mean, over its standard deviation.
        env: `dataset` evaluates in the environment that the data set names; null trains without evaluation, and with
            the rewards and ends of the data.
        seed: of the validation split, a tenth of the trajectories.
    """

    dataset_id: str
    download: bool
    reward_shift: float = 0.0
    goal: Literal["evaluation", "observation"] = "evaluation"
    env: Literal["dataset"] | None = "dataset"
    seed: Seed = 0
    standardise: bool = False
    _dataset: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.dataset_id

    @property
    def task(self) -> str:
        return self.dataset_id

    def prepare(self) -> None:
        self._load()

    def _load(self) -> Any:
        if self._dataset is None:
            require("data=minari", "minari", "h5py")
            import minari

            try:
                if self.download and not _folder(self.dataset_id).exists():
                    minari.download_dataset(self.dataset_id)
                _check_environments(self.dataset_id)  # to load may already be to make one
                dataset = minari.load_dataset(self.dataset_id)
            except UserError:
                raise
            except Exception as error:  # its client raises whatever its storage and its HTTP library do
                raise UserError(f"cannot load Minari's data set {self.dataset_id}: {error}") from error
            self._check(dataset)
            self._dataset = dataset
        return self._dataset

    def _check(self, dataset: Any) -> None:
        """Say what there is no environment for, and raise `UserError` for what is not read."""
        check_states(dataset.observation_space, f"{self.name}: observations")
        if not isinstance(dataset.action_space, Box):
            raise UserError(f"{self.name}: actions of {dataset.action_space} are not read, only boxes")
        if self.goal == "observation" and not has_goal(dataset.observation_space):
            raise UserError(f"data.source.goal=observation, and {self.name} has no {DESIRED} in its observations")
        if self.env is not None and not _names_environment(dataset):
            log.warning("%s names no environment: it is trained without evaluation", self.name)

    @property
    def _space(self) -> Any:
        return self._load().observation_space

    def arrays(self) -> tuple[Arrays, None]:
        columns: dict[str, list[np.ndarray]] = {}
        goals = []
        for episode in self._load().iterate_episodes():
            for key, column in self._rows(episode).items():
                columns.setdefault(key, []).append(column)
            if self._relies_on_one_goal:
                of_episode = flatten(self._space[DESIRED], episode.observations[DESIRED])
                goals += [of_episode.min(axis=0), of_episode.max(axis=0)]
        if goals:
            self._check_goals(np.array(goals))
        return {key: np.concatenate(parts) for key, parts in columns.items()}, None

    def _rows(self, episode: Any) -> Arrays:
        """An episode in compact layout."""
        observations, length = self._view.observe(episode.observations), len(episode.actions)
        if len(observations) != length + 1:
            raise UserError(
                f"{self.name}: episode {episode.id} has {len(observations)} observations for {length} actions; it "
                f"needs {length + 1}, the last of them the state in which it ended"
            )
        led_to = _without_first(episode.observations)
        rewards, ends = self._view.label(led_to, np.asarray(episode.rewards), np.asarray(episode.terminations))
        return {
            "observations": observations,
            "actions": _with_last_again(episode.actions.reshape(length, -1)),
            "rewards": _padded(rewards),
            "masks": _padded(1.0 - ends),
            "valids": _padded(np.ones(length, np.float32)),
        }

    def label(self, reward: Reward) -> Reward:
        return reward + self.reward_shift

    def with_units(self, whole: Transitions) -> Transitions:
        """A policy decides the bounds of the data set's actions as -1 and 1."""
        space = self._load().action_space
        if space.is_bounded():
            whole = replace(whole, units=Units(*unless_one(space.low.reshape(-1), space.high.reshape(-1))))
        return super().with_units(whole)

    @cached_property
    def _view(self) -> View:
        """What the data are seen with, by the rules of an environment that is kept for them."""
        return self._view_of(self._recover()) if self.has_env and has_goal(self._space) else self._view_of(None)

    def _view_of(self, env: gymnasium.Env | None) -> View:
        shown = without_goal(self._space) if has_goal(self._space) and self.goal == "evaluation" else self._space
        if env is None or not has_goal(self._space) or not is_maze(env):
            return View(shown)
        return View(shown, env.unwrapped, self._only_goal(env.unwrapped) if self.goal == "evaluation" else None)

    def _only_goal(self, maze: Any) -> np.ndarray:
        """The middle of the cell near which a maze draws its goal."""
        cells = np.unique(np.array(maze.maze.unique_goal_locations), axis=0)
        if len(cells) == 1:
            return cells[0]
        raise UserError(
            f"data.source.goal=evaluation, and the evaluation environment of {self.name} draws its goal from "
            f"{len(cells)} cells: set data.source.goal=observation"
        )

    @property
    def _relies_on_one_goal(self) -> bool:
        """Whether steps keep labels for goals that the agent does not see."""
        return has_goal(self._space) and self.goal == "evaluation" and self._view.maze is None

    def _check_goals(self, goals: np.ndarray) -> None:
        """Raise `UserError` unless all goals of the data, shape (goals, size), are one, and the environment's."""
        if not _is_same(goals, goals[0]):
            raise UserError(
                f"data.source.goal=evaluation, and the goals in {self.name} differ, so that its rewards contradict "
                "each other where the goal is not seen: set data.source.goal=observation"
            )
        if self.has_env and not _is_same(self._goals_of_env(), goals[0]):
            raise UserError(
                f"data.source.goal=evaluation, and the environment of {self.name} has other goals than the data: set "
                "data.source.goal=observation"
            )

    def _goals_of_env(self) -> np.ndarray:
        env = self._recover()
        goals = [as_row(env.reset(seed=seed)[0][DESIRED]) for seed in range(GOAL_RESETS)]
        env.close()
        return np.concatenate([flatten(self._space[DESIRED], goal) for goal in goals])

    def spec(self) -> Spec:
        shown = self._view_of(None)  # sizes need no environment
        return Spec(shown.size, int(np.prod(self._load().action_space.shape)))

    @property
    def has_env(self) -> bool:
        return self.env is not None and _names_environment(self._load())

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        env = self._recover(**kwargs)
        return Viewed(env, self._view_of(env))

    def _recover(self, **kwargs: Any) -> gymnasium.Env:
        """The evaluation environment as it is, but for a maze's limit of steps: that of data may be without end."""
        if importlib.util.find_spec("gymnasium_robotics") is not None:
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
        try:
            env = self._load().recover_environment(eval_env=True, **kwargs)
        except Exception as error:  # the environment's package may be missing, or its version gone
            raise UserError(
                f"cannot make the environment of {self.name}: {error!r}; data.source.env=null trains without it"
            ) from error
        if shapes(env.observation_space) != shapes(self._space):
            raise UserError(
                f"the environment of {self.name} has other observations than the data: "
                f"{shapes(env.observation_space)}, not {shapes(self._space)}; data.source.env=null trains without it"
            )
        registered = gymnasium.registry.get(env.spec.id)
        if is_maze(env) and registered is not None and registered.max_episode_steps is not None:
            env = TimeLimit(env, registered.max_episode_steps)
        return env

    def protocol(self) -> dict[str, Any]:
        if not self.has_env:
            return {"protocol": "Minari data, without an environment"}
        if self._view.maze is None:
            return {"protocol": "Minari data and environment; its score is not D4RL's", "score": "Minari's normalised"}
        goal = "shown to the agent" if self._view.goal is None else f"at {self._view.goal.tolist()}"
        return {"protocol": f"Minari data and environment, both relabelled to a task that ends at its goal, {goal}"}

    def score(self, episode_return: float) -> float | None:
        metadata = self._load().storage.metadata
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        if low is None or high is None or self._view.maze is not None:  # returns of another task
            return None
        return 100.0 * (episode_return - low) / (high - low)

    def provenance(self) -> dict[str, Any]:
        storage = self._load().storage
        return {"name": self.name, "path": str(storage.data_path), "generated": False}


def _folder(dataset_id: str) -> Path:
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path(dataset_id) / "data"


def _check_environments(dataset_id: str) -> None:
    """The environments that a data set names are code: of known packages, or trusted ones."""
    file = _folder(dataset_id) / "metadata.json"
    metadata = json.loads(file.read_text()) if file.exists() else {}
    for key in ENVIRONMENTS:
        if metadata.get(key) is not None:
            check_environment_spec(metadata[key], f"{file}: {key}")


def _names_environment(dataset: Any) -> bool:
    return any(dataset.storage.metadata.get(key) is not None for key in ENVIRONMENTS)


def _is_same(goals: np.ndarray, goal: np.ndarray) -> bool:
    return np.allclose(goals, goal, rtol=SAME_GOAL, atol=SAME_GOAL * float(np.abs(goal).max()))


def _without_first(observations: Any) -> Any:
    """The states to which an episode's steps led."""
    if isinstance(observations, dict):
        return {key: _without_first(part) for key, part in observations.items()}
    return observations[1:]


def _with_last_again(actions: np.ndarray) -> np.ndarray:
    """A row more, for the episode's last state, in which nothing was done."""
    return np.concatenate([actions, actions[-1:]])


def _padded(column: np.ndarray) -> np.ndarray:
    """A row of zeros more, for the episode's last state."""
    return np.concatenate([column, np.zeros_like(column[:1])])
