"""What an agent is shown and told of a task with dictionary observations or goals: in the data and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space
from gymnasium.spaces.utils import flatdim

from deflow.errors import UserError

ACHIEVED, DESIRED = "achieved_goal", "desired_goal"  # gymnasium-robotics' keys of a goal environment
OF_A_MAZE = ("maze", "continuing_task", "reset_target", "compute_reward", "compute_terminated")


@dataclass(frozen=True)
class View:
    """How observations are shown and steps are labelled; `Viewed` does it for an environment.

    Args:
        shown: space of the part of an observation that the agent sees, boxes in any nesting of dictionaries.
        maze: gymnasium-robotics' environment whose rules say what a step is worth, and that the task ends at the goal
            (it is set so); None leaves both as they are.
        goal: for which a maze's steps are labelled, shape (2,); None labels each for the goal in its observation.
    """

    shown: Space
    maze: Any = None
    goal: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.maze is not None:
            self.maze.continuing_task = self.maze.reset_target = False

    @property
    def size(self) -> int:
        """Numbers in what the agent sees."""
        return flatdim(self.shown)

    def observe(self, observations: Any) -> np.ndarray:
        """What the agent sees of `observations`, one row a state, shape (rows, size)."""
        return flatten(self.shown, observations)

    def label(self, observations: Any, rewards: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and whether the task ended, both of shape (steps,).

        Args:
            observations: to which each step led.
            rewards: as they are without labels, shape (steps,).
            ends: likewise.
        """
        if self.maze is None:
            return rewards, ends
        achieved = np.asarray(observations[ACHIEVED])
        goals = np.asarray(observations[DESIRED]) if self.goal is None else np.broadcast_to(self.goal, achieved.shape)
        ended = [self.maze.compute_terminated(*of_step, {}) for of_step in zip(achieved, goals, strict=True)]
        return self.maze.compute_reward(achieved, goals, {}), np.array(ended, bool)


class Viewed(gymnasium.Wrapper):
    """An environment as a view has the data; a maze's goal stands where the view has it.

    Args:
        env: whose observations are those that `view` was made for.
        view: with this environment's own maze, if it is one.
    """

    def __init__(self, env: gymnasium.Env, view: View) -> None:
        super().__init__(env)
        self._view = view
        self.observation_space = Box(-np.inf, np.inf, (view.size,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if self._view.goal is not None:
            self._view.maze.goal = self._view.goal.copy()
            self._view.maze.update_target_site_pos()
        return self._view.observe(as_row(observation))[0], info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        row = as_row(observation)
        rewards, ends = self._view.label(row, np.array([reward]), np.array([terminated]))
        return self._view.observe(row)[0], float(rewards[0]), bool(ends[0]), truncated, info


def flatten(space: Space, values: Any) -> np.ndarray:
    """One row a state, in the order of `space`, as `gymnasium.spaces.utils.flatten` has it; shape (rows, size).

    Args:
        space: a box, or a dictionary of spaces.
        values: array of shape (rows, ...), or a dictionary of what belongs to its spaces; other keys are left out.
    """
    if isinstance(space, Dict):
        return np.concatenate([flatten(part, values[key]) for key, part in space.spaces.items()], axis=1)
    array = np.asarray(values)
    return array.reshape(len(array), -1)


def as_row(observation: Any) -> Any:
    """A single observation as the only one of several."""
    if isinstance(observation, Mapping):
        return {key: as_row(value) for key, value in observation.items()}
    return np.asarray(observation)[None]


def has_goal(space: Space) -> bool:
    """Whether observations say which goal is to be reached."""
    return isinstance(space, Dict) and {ACHIEVED, DESIRED} <= set(space.spaces)


def without_goal(space: Space) -> Space:
    """`space` without the goal to be reached."""
    return Dict({key: part for key, part in cast(Dict, space).spaces.items() if key != DESIRED})


def check_states(space: Space, where: str) -> None:
    """Raise `UserError`, naming `where`, unless `space` holds states, which can be flattened to numbers."""
    if isinstance(space, Dict):
        for key, part in space.spaces.items():
            check_states(part, f"{where}/{key}")
    elif not isinstance(space, Box):
        raise UserError(f"{where} of {space} are not read, only boxes and dictionaries of them")
    elif space.dtype == np.uint8 and len(space.shape) > 1:
        raise UserError(f"{where} are images of shape {space.shape}, which are not read: take a set with states")


def shapes(space: Space) -> Any:
    """Shape of a space; of a dictionary, those of its parts."""
    return {k: shapes(part) for k, part in space.spaces.items()} if isinstance(space, Dict) else space.shape


def is_maze(env: gymnasium.Env) -> bool:
    """Whether an environment is one of gymnasium-robotics' mazes."""
    return all(hasattr(env.unwrapped, name) for name in OF_A_MAZE)
