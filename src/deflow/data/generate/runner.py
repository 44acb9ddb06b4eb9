"""Generate a data set in parallel processes, the same for a seed whatever their number."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
from rich.progress import Progress, track

from deflow.cores import usable_cores
from deflow.data.generate.ant import AntExpert
from deflow.data.generate.maze import NOISE, MazeCollector, follow_direction
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.files import locked, refuse_to_replace, replacing_all
from deflow.seeding import fold_seed
from deflow.signals import end_with_parent

log = logging.getLogger(__name__)

EPISODE_STEPS = {"navigate": 1001, "stitch": 201, "explore": 501, "play": 1001, "noisy": 1001}
TYPES = {
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}
ROW_BYTES = 600  # more than a row of states takes
DTYPES = {"terminals": np.bool_, "button_states": np.int64}


class Collector(Protocol):
    """Plays one episode: what differs between mazes and manipulation."""

    env: gymnasium.Env

    def reset(self, rng: np.random.Generator, seed: int) -> tuple[np.ndarray, dict[str, Any]]: ...
    def act(self, observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> np.ndarray: ...
    def after_step(self, info: dict[str, Any], rng: np.random.Generator) -> None: ...
    def healthy(self, episode: dict[str, np.ndarray]) -> bool: ...


def generate_dataset(
    name: str,
    episodes: int,
    out: Path,
    seed: int = 0,
    workers: int | None = None,
    steps: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `name.npz`, `name-val.npz` (a tenth of the episodes, at least one) and a card `name.json` into `out`.

    The three appear together, or none of them does.

    Args:
        name: OGBench's name, such as `pointmaze-medium-navigate-v0`.
        episodes: of the training file.
        out: folder, made if missing.
        seed: every episode's randomness follows from it and the episode's number alone.
        workers: processes; None is one for each core that this process may use.
        steps: states an episode; OGBench's own number (1001, stitch 201, explore 501) unless given.
        overwrite: whether to replace files of these names.

    Returns:
        The training file's path.

    Raises:
        UserError: for a data set without a recipe here, files that would be lost, or too little disk.
    """
    _, dataset = _recipe(name)
    env = ogbench.make_env(name)  # whether there is such an environment, before any process is started
    observation = env.observation_space
    env.close()
    steps = steps or EPISODE_STEPS[dataset]
    path = out.expanduser() / f"{name}.npz"
    files = [path.with_suffix(".json"), path.with_name(f"{name}-val.npz"), path]
    if not overwrite:
        refuse_to_replace(files)
    image_bytes = int(np.prod(observation.shape or ())) if observation.dtype == np.uint8 else 0
    _check_disk(path.parent, episodes * steps, ROW_BYTES + image_bytes)
    jobs = [("train", i) for i in range(episodes)] + [("val", i) for i in range(max(1, episodes // 10))]
    seeds = [fold_seed(seed, name, split, i) for split, i in jobs]
    made = {
        "generated_by": f"deflow {version('deflow')}",
        "episodes": episodes,
        "steps_an_episode": steps,
        "seed": seed,
        "ogbench": version("ogbench"),
        "mujoco": version("mujoco"),
    }
    with locked(path.with_name(f".{name}.lock"), f"another process that generates {name}"):
        if not overwrite:
            refuse_to_replace(files)  # of whoever held the lock
        results = _collect_all(name, steps, seeds, min(workers or usable_cores(), len(seeds)))
        with replacing_all(files) as (card, val, train):
            _write(val, results[episodes:])
            _write(train, results[:episodes])
            card.write_text(json.dumps(made | {"bytes": train.stat().st_size}, indent=2) + "\n")
    return path


def generated_path(folder: Path, name: str, episodes: int, seed: int) -> Path:
    """Where generated data lie below a folder of data, so that they never pass for the published set."""
    return folder / "generated" / f"{name}-{episodes}ep-seed{seed}" / f"{name}.npz"


def read_card(path: Path) -> dict[str, Any]:
    """What the card of a generated training file says; empty if it has none, or one of another file."""
    card = path.with_suffix(".json")
    if not card.is_file():
        return {}
    try:
        made = json.loads(card.read_text())
        if "generated_by" in made and made["bytes"] == path.stat().st_size:
            return made
    except (ValueError, KeyError, TypeError):  # not JSON, or not a card
        pass
    log.warning("%s is not the card of %s as it is: not believed", card, path.name)
    return {}


def _recipe(name: str) -> tuple[str, str]:
    """Family and data-set type of a name; `UserError` if there is no recipe."""
    family, _, rest = name.removesuffix("-v0").removeprefix(ogbench.VISUAL).partition("-")
    dataset = rest.rpartition("-")[2]
    visual_maze = name.startswith(ogbench.VISUAL) and family in NOISE  # its recipe reads the state
    if visual_maze or not name.endswith("-v0") or dataset not in TYPES.get(family, ()):
        raise UserError(
            f"cannot generate '{name}': choose pointmaze-SIZE-{{navigate,stitch}}-v0, "
            "antmaze-SIZE-{navigate,stitch,explore}-v0 or {cube-N,scene,puzzle-RxC}-{play,noisy}-v0, the last also as "
            "visual-cube-N-... with images"
        )
    return family, dataset


def _collect_all(name: str, steps: int, seeds: Sequence[int], workers: int) -> list[dict[str, np.ndarray]]:
    play = partial(_play, name, steps)
    if workers == 1:
        return list(track(map(play, seeds), total=len(seeds), description=f"generating {name}"))
    # `spawn`: a forked process would inherit locks and rendering contexts of this one.
    context = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        task = progress.add_task(f"generating {name}", total=len(seeds))
        results = []
        try:
            for episode in pool.map(play, seeds):
                results.append(episode)
                progress.advance(task)
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that generated {name} was killed: generate it again, workers=1 if memory is short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # of those not begun, if this one ends early
        return results


# One collector a process: making a manipulation environment costs as much as hundreds of its steps.
_collectors: dict[tuple[str, int], Collector] = {}


def _play(name: str, steps: int, seed: int) -> dict[str, np.ndarray]:
    if (name, steps) not in _collectors:
        _collectors[name, steps] = _make_collector(name, steps)
    return collect_episode(_collectors[name, steps], seed)


def _make_collector(name: str, steps: int) -> Collector:
    family, dataset = _recipe(name)
    if family in NOISE:
        env = ogbench.make_env(name, terminate_at_goal=False, max_episode_steps=steps)
        return MazeCollector(env, dataset, AntExpert() if family == "antmaze" else follow_direction, NOISE[family])
    from deflow.data.generate.manipulation import ManipulationCollector

    env = ogbench.make_env(name, terminate_at_goal=False, mode="data_collection", max_episode_steps=steps)
    return ManipulationCollector(env, dataset)


def collect_episode(collector: Collector, seed: int) -> dict[str, np.ndarray]:
    """One episode in OGBench's format; unhealthy ones are collected again with the next seed that follows."""
    attempt = 0
    while True:
        episode = _collect_once(collector, fold_seed(seed, attempt))
        if collector.healthy(episode):
            return episode
        attempt += 1


def _collect_once(collector: Collector, seed: int) -> dict[str, np.ndarray]:
    # OGBench's oracles and mazes draw from NumPy's global generator and from the action space's.
    np.random.seed(seed % 2**32)  # noqa: NPY002
    collector.env.unwrapped.action_space.seed(seed)
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {}
    observation, info = collector.reset(rng, seed % 2**31)
    done = False
    while not done:
        action = collector.act(observation, info, rng)
        next_observation, _, terminated, truncated, info = collector.env.step(action)
        done = terminated or truncated
        collector.after_step(info, rng)
        row = {"observations": observation, "actions": action, "terminals": done}
        row |= {key: info[f"prev_{key}"] for key in ("qpos", "qvel", "button_states") if f"prev_{key}" in info}
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
        observation = next_observation
    columns = {key: np.asarray(values) for key, values in rows.items()}
    return {
        key: column if column.dtype == np.uint8 else column.astype(DTYPES.get(key, np.float32))
        for key, column in columns.items()
    }


def _check_disk(out: Path, rows: int, row_bytes: int) -> None:
    needed = rows * row_bytes
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if free < needed:
        raise UserError(f"no space for {rows} rows in {out}: about {needed >> 20} MiB needed, {free >> 20} MiB free")


def _write(path: Path, episodes: Sequence[dict[str, np.ndarray]]) -> None:
    columns = {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}
    np.savez_compressed(path, **columns)  # type: ignore[arg-type]
