"""OGBench's environments: names, construction, seeding."""

from __future__ import annotations

import ctypes.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from deflow.errors import UserError
from deflow.types import Spec

# Must be set before mujoco is first imported: off-screen rendering where the library for it exists.
if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disabled"

import gymnasium

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ogbench

# OGBench gives float64 bounds for float32 boxes, in every environment.
warnings.filterwarnings("ignore", ".*precision lowered by casting")

TASK_IDS = range(1, 6)
FAMILIES = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")


def dataset_name(env: str, dataset: str) -> str:
    """OGBench's name of a data set, such as `cube-single-play-v0`."""
    return f"{env}-{dataset}-v0"


def task_name(env: str, dataset: str, task_id: int | None) -> str:
    """OGBench's single-task name, such as `cube-single-play-singletask-task2-v0`; no task id means its default."""
    if task_id is not None and task_id not in TASK_IDS:
        raise UserError(f"task_id must be 1 to 5 (or null for the environment's default task), got {task_id}")
    task = "" if task_id is None else f"-task{task_id}"
    return f"{env}-{dataset}-singletask{task}-v0"


def make_env(name: str, **kwargs: Any) -> gymnasium.Env:
    """The environment of a data-set or single-task name.

    Raises:
        UserError: if OGBench has no such environment.
    """
    try:
        return ogbench.make_env_and_datasets(name, env_only=True, **kwargs)
    except gymnasium.error.Error as error:
        known = ", ".join(sorted({re.sub(r"-v0$", "", i) for i in gymnasium.registry if _is_state_env(i)}))
        raise UserError(f"OGBench has no environment for '{name}'; environments: {known}") from error


def load_arrays(name: str, path: str, env: gymnasium.Env) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and validation arrays of a single-task name in compact layout, relabelled with the task's rewards.

    The goal that the rewards are for is drawn near the task's: always the same one here.
    """
    with _numpy_seed(0):
        return ogbench.make_env_and_datasets(
            name, dataset_path=path, compact_dataset=True, dataset_only=True, cur_env=env
        )


def spec_of(env: gymnasium.Env) -> Spec:
    """Sizes of the environment's observations and actions."""
    assert env.observation_space.shape is not None
    assert env.action_space.shape is not None
    return Spec(env.observation_space.shape[0], env.action_space.shape[0])


def seeded_reset(env: gymnasium.Env, seed: int, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Reset so that the seed alone decides the first state: mazes also draw from NumPy's global generator."""
    env.unwrapped.action_space.seed(seed)
    with _numpy_seed(seed % 2**32):
        return env.reset(seed=seed, **kwargs)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator, from which OGBench draws goals, seeded inside and as it was outside."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _is_state_env(name: str) -> bool:
    return name.startswith(FAMILIES) and "singletask" not in name and "oraclerep" not in name
