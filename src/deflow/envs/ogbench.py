"""OGBench's environments: names, construction, seeding."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from deflow.envs.rendering import off_screen
from deflow.errors import UserError
from deflow.types import Spec

# Must be set before mujoco is first imported.
if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = off_screen()

import gymnasium
from gymnasium.wrappers import FrameStackObservation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ogbench

# OGBench gives float64 bounds for float32 boxes, in every environment.
warnings.filterwarnings("ignore", ".*precision lowered by casting")

TASK_IDS = range(1, 6)
FAMILIES = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle")
VISUAL = "visual-"  # with which the names of environments begin that show images


def dataset_name(env: str, dataset: str) -> str:
    """OGBench's name of a data set, such as `cube-single-play-v0`."""
    return f"{env}-{dataset}-v0"


def task_name(env: str, dataset: str, task_id: int | None) -> str:
    """OGBench's single-task name, such as `cube-single-play-singletask-task2-v0`; no task id means its default."""
    if task_id is not None and task_id not in TASK_IDS:
        raise UserError(f"task_id must be 1 to 5 (or null for the environment's default task), got {task_id}")
    task = "" if task_id is None else f"-task{task_id}"
    return f"{env}-{dataset}-singletask{task}-v0"


def load_mujoco() -> None:
    """Import the simulator, which loads the graphics library that `MUJOCO_GL` names.

    Raises:
        UserError: if there is no such library, here or at all.
    """
    try:
        import mujoco  # noqa: F401
    except (AttributeError, ImportError, RuntimeError, ctypes.ArgumentError) as error:  # the last one without OpenGL
        chosen = os.environ.get("MUJOCO_GL")
        if chosen is None:
            raise UserError(f"MuJoCo cannot be loaded ({error})") from error
        raise UserError(
            f"MUJOCO_GL={chosen} does not work here ({error}): unset it, or set it to egl, glfw or disabled"
        ) from error


def make_env(name: str, **kwargs: Any) -> gymnasium.Env:
    """The environment of a data-set or single-task name.

    Raises:
        UserError: if OGBench has no such environment, it shows images and this machine cannot render, or `MUJOCO_GL`
            asks for what is not here.
    """
    load_mujoco()
    if name.startswith(VISUAL) and os.environ.get("MUJOCO_GL") == "disabled":
        raise UserError(f"'{name}' is rendered, which needs EGL and OpenGL: install them (Debian: libegl1 libopengl0)")
    try:
        return ogbench.make_env_and_datasets(name, env_only=True, **kwargs)
    except gymnasium.error.Error as error:
        known = ", ".join(sorted({re.sub(r"-v0$", "", i) for i in gymnasium.registry if _is_env(i)}))
        raise UserError(f"OGBench has no environment for '{name}'; environments: {known}") from error


def stack_frames(env: gymnasium.Env, frames: int) -> gymnasium.Env:
    """An environment that shows images with its last `frames` ones, the newest last; another as it is."""
    assert env.observation_space.shape is not None
    return FrameStackObservation(env, frames, padding_type="reset") if len(env.observation_space.shape) == 3 else env


def load_arrays(name: str, path: str, env: gymnasium.Env) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and validation arrays of a single-task name in compact layout, relabelled with the task's rewards.

    The goal that the rewards are for is drawn near the task's: always the same one here.
    """
    with _numpy_seed(0):
        return ogbench.make_env_and_datasets(
            name, dataset_path=path, compact_dataset=True, dataset_only=True, cur_env=env
        )


def share_in_free_cells(env: gymnasium.Env, observations: np.ndarray, looked_at: int = 1000) -> float | None:
    """Share of the positions in some observations (x, y first) that are no wall of the maze; None outside of mazes.

    Args:
        env: the environment.
        observations: shape (rows, observation_dim); images tell no position.
        looked_at: rows, evenly spaced.
    """
    maze: Any = env.unwrapped
    if not hasattr(maze, "xy_to_ij") or observations.ndim > 2:
        return None
    some = observations[np.linspace(0, len(observations) - 1, min(looked_at, len(observations))).astype(int)]
    rows, columns = np.array([maze.xy_to_ij(xy) for xy in np.nan_to_num(some[:, :2])]).T
    height, width = maze.maze_map.shape
    within = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    free = maze.maze_map[rows.clip(0, height - 1), columns.clip(0, width - 1)] == 0
    return float((within & free).mean())


def spec_of(env: gymnasium.Env) -> Spec:
    """Sizes of the environment's observations and actions."""
    shape, actions = env.observation_space.shape, env.action_space.shape
    assert shape is not None
    assert actions is not None
    image = cast(tuple[int, int, int, int], shape) if len(shape) == 4 else None
    return Spec(int(np.prod(shape)), actions[0], image=image)


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


def _is_env(name: str) -> bool:
    return name.removeprefix(VISUAL).startswith(FAMILIES) and "singletask" not in name and "oraclerep" not in name
