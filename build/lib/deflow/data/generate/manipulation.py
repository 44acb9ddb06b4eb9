"""Manipulation data by OGBench's recipe: the package's scripted oracles play with the objects (arXiv 2410.20092)."""

from __future__ import annotations

from typing import Any

import numpy as np
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

from deflow.envs.ogbench import VISUAL

# `play`: open-loop plans with temporally smoothed noise. `noisy`: closed-loop oracles with white action noise.
PLAN_NOISE = {"noise": 0.1, "noise_smoothing": 0.5}
MIN_NORM = 0.4  # shortest motion of the closed-loop oracles, in action units
NOISY_MAX = 0.1  # each noisy episode draws its noise level from [0, NOISY_MAX]
NOISY_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # per action dimension: x, y, z, yaw, gripper

PLAN = {"cube": CubePlanOracle, "button": ButtonPlanOracle, "drawer": DrawerPlanOracle, "window": WindowPlanOracle}
MARKOV = {
    "cube": CubeMarkovOracle,
    "button": ButtonMarkovOracle,
    "drawer": DrawerMarkovOracle,
    "window": WindowMarkovOracle,
}
OBJECTS = {"cube": ("cube",), "scene": ("cube", "button", "drawer", "window"), "puzzle": ("button",)}

# Range of the probability that a cube is put on another, drawn for each episode.
STACKING = {"single": (0.0, 0.0), "double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
STACKING_ELSE = (0.5, 0.5)


class ManipulationCollector:
    """Collects one episode at a time with scripted oracles that pick a new target whenever one is done.

    Args:
        env: made with `terminate_at_goal=False, mode="data_collection"`.
        dataset: `play` or `noisy`.
    """

    def __init__(self, env: Any, dataset: str) -> None:
        self.env, self.dataset = env, dataset
        family, variant = env.spec.id.removeprefix(VISUAL).split("-")[:2]
        self.family, self.stacking = family, STACKING.get(variant, STACKING_ELSE)
        self.oracles = {thing: self._oracle(thing) for thing in OBJECTS[family]}

    def reset(self, rng: np.random.Generator, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode: the arm and the objects at random, a first target."""
        observation, info = self.env.reset(seed=seed)
        self.stack_probability = rng.uniform(*self.stacking)
        self.noise = rng.uniform(0.0, NOISY_MAX)
        self._follow(observation, info)
        return observation, info

    def act(self, observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
        """The oracle's action, with noise."""
        action = np.asarray(self.oracle.select_action(observation, info))
        if self.dataset == "noisy":
            action = action + rng.normal(0.0, self.noise * NOISY_SCALE)
        return np.clip(action, -1.0, 1.0)

    def after_step(self, info: dict[str, Any], rng: np.random.Generator) -> None:
        """Set the next target when the oracle is done with its own."""
        if self.oracle.done:
            self._follow(*self.env.unwrapped.set_new_target(p_stack=self.stack_probability))

    def healthy(self, episode: dict[str, np.ndarray]) -> bool:
        """Whether the scene's cube stayed in sight or in the drawer; other episodes are collected anew."""
        if self.family != "scene":
            return True
        _, y, z = episode["qpos"][:, 14:17].T
        too_far_right = y >= 0.29
        too_far_left = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
        return not (too_far_right | too_far_left).any()

    def _follow(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        self.oracle = self.oracles[info["privileged/target_task"]]
        self.oracle.reset(observation, info)

    def _oracle(self, thing: str) -> Any:
        gripper = {"gripper_always_closed": True} if self.family == "puzzle" else {}
        if self.dataset == "play":
            return PLAN[thing](env=self.env, **PLAN_NOISE, **gripper)
        limit = {"max_step": 100} if (self.family, thing) == ("scene", "cube") else {}
        return MARKOV[thing](env=self.env, min_norm=MIN_NORM, **limit, **gripper)
