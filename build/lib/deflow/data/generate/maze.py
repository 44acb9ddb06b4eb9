"""Maze data by OGBench's recipe: follow the shortest path to a goal, or a random direction (arXiv 2410.20092)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Cell = tuple[int, int]

# Standard deviation of the Gaussian action noise of the published sets.
NOISE = {"pointmaze": 0.5, "antmaze": 0.2}
EXPLORE_NOISE = 1.0
STITCH_DISTANCE = 4  # cells between the start and the goal of a `stitch` episode
EXPLORE_INTERVAL = 10  # steps for which an `explore` episode keeps its random direction


class MazeCollector:
    """Collects one episode at a time in a maze.

    Args:
        env: made with `terminate_at_goal=False`.
        dataset: `navigate` (a new goal whenever one is reached), `stitch` (one goal four cells away) or `explore` (no
            goal, but a new random direction every ten steps and much noise).
        policy: action from the observation and a unit direction to walk along; noise is added to it.
        noise: standard deviation of that noise.
    """

    def __init__(
        self, env: Any, dataset: str, policy: Callable[[np.ndarray, np.ndarray], np.ndarray], noise: float
    ) -> None:
        self.env, self.maze = env, env.unwrapped
        self.dataset, self.policy = dataset, policy
        self.noise = EXPLORE_NOISE if dataset == "explore" else noise
        free = self.maze.maze_map == 0
        self.cells: list[Cell] = [(int(i), int(j)) for i, j in np.argwhere(free)]
        self.corners = [cell for cell in self.cells if not _is_hallway(free, cell)]
        self._subgoals: dict[tuple[Cell, Cell], np.ndarray] = {}

    def reset(self, rng: np.random.Generator, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a random cell, with a goal."""
        start = self.cells[rng.integers(len(self.cells))]
        if self.dataset == "stitch":
            near = self._cells_at(start, STITCH_DISTANCE)
            goal = near[rng.integers(len(near))] if near else start
        else:
            goal = self._random_corner(rng)
        self.steps = 0
        return self.env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})

    def act(self, observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
        """The noisy expert action."""
        if self.dataset != "explore":
            self.direction = _unit(self._subgoal() - self.maze.get_xy())
        elif self.steps % EXPLORE_INTERVAL == 0:
            self.direction = _unit(rng.standard_normal(2))
        self.steps += 1
        action = self.policy(observation, self.direction)
        return np.clip(action + rng.normal(0.0, self.noise, action.shape), -1.0, 1.0)

    def after_step(self, info: dict[str, Any], rng: np.random.Generator) -> None:
        """Give the next goal when one is reached."""
        if self.dataset == "navigate" and info["success"]:
            corner = self.maze.ij_to_xy(self._random_corner(rng))
            self.maze.set_goal(goal_xy=self.maze.add_noise(corner))

    def healthy(self, episode: dict[str, np.ndarray]) -> bool:
        return True

    def _subgoal(self) -> np.ndarray:
        """The centre of the next cell on the shortest path; OGBench searches the maze anew at every call."""
        here = self.maze.xy_to_ij(self.maze.get_xy())
        goal = self.maze.xy_to_ij(self.maze.cur_goal_xy)
        if (here, goal) not in self._subgoals:
            xy, _ = self.maze.get_oracle_subgoal(self.maze.ij_to_xy(here), self.maze.ij_to_xy(goal))
            self._subgoals[here, goal] = xy
        return self._subgoals[here, goal]

    def _cells_at(self, start: Cell, distance: int) -> list[Cell]:
        xy = self.maze.ij_to_xy(start)
        _, distances = self.maze.get_oracle_subgoal(xy, xy)
        return [(int(i), int(j)) for i, j in np.argwhere(distances == distance)]

    def _random_corner(self, rng: np.random.Generator) -> Cell:
        return self.corners[rng.integers(len(self.corners))]


def follow_direction(observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The point mass's expert: the direction itself."""
    return direction


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.linalg.norm(vector) + 1e-6)


def _is_hallway(free: np.ndarray, cell: Cell) -> bool:
    """Whether a cell only lets one pass straight through, and so is no place for a goal."""
    i, j = cell
    vertical, horizontal = (free[i - 1, j], free[i + 1, j]), (free[i, j - 1], free[i, j + 1])
    return (all(vertical) and not any(horizontal)) or (all(horizontal) and not any(vertical))
