"""The real configurations, composed and then shrunk; tiny data for every environment, made on the spot."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import DictConfig

from deflow.config import CONFIG_DIR
from deflow.data.sources.d4rl import SIZES
from deflow.envs import ogbench
from deflow.pipeline import train
from deflow.run_folder import SUMMARY_FILE
from tests.commands import ROOT, TINY, kill_left_over

EPISODES, STEPS = 4, 40
CKPT = Path("checkpoints", "0_joint", "final.ckpt")  # of a run with stages=joint


def compose_config(*overrides: str, config_name: str = "train", **more: Any) -> DictConfig:
    """The composed configuration, as the command line would give it; a copy, for the test to change."""
    return copy.deepcopy(_composed(overrides, config_name, **more))


@cache
def _composed(overrides: tuple[str, ...], config_name: str, **more: Any) -> DictConfig:
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        return compose(config_name, overrides=list(overrides), **more)


def tiny_config(data_dir: Path, *overrides: str) -> DictConfig:
    """A training configuration that runs in seconds on the data in `data_dir`."""
    return compose_config(*TINY, f"paths.data={data_dir}", *overrides)


def write_tiny_data(env_name: str, dataset: str, folder: Path) -> Path:
    """Random actions in an environment, in OGBench's format; returns the training file."""
    name = ogbench.dataset_name(env_name, dataset)
    env = ogbench.make_env(name, terminate_at_goal=False, max_episode_steps=STEPS)
    rows: dict[str, list] = {}
    for episode in range(EPISODES):
        observation, _ = ogbench.seeded_reset(env, episode)
        done = False
        while not done:
            action = env.action_space.sample()
            next_observation, _, _, done, info = env.step(action)
            row = {"observations": observation, "actions": action, "terminals": done}
            row |= {k: info[f"prev_{k}"] for k in ("qpos", "qvel", "button_states") if f"prev_{k}" in info}
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
            observation = next_observation
    env.close()
    types = {"terminals": bool, "button_states": np.int64}
    arrays = {key: np.asarray(value, types.get(key, np.float32)) for key, value in rows.items()}
    for suffix in ("", "-val"):
        np.savez_compressed(folder / f"{name}{suffix}.npz", **arrays)
    return folder / f"{name}.npz"


def write_d4rl(path: Path, family: str, episodes: int = 4, length: int = 40) -> Path:
    """Random numbers as D4RL's files have them: trajectories one after the other, each cut by a time-out."""
    rng = np.random.default_rng(0)
    observation_dim, action_dim = SIZES[family]
    rows = episodes * length
    columns = {
        "observations": rng.normal(size=(rows, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "rewards": (rng.random(rows) < 0.05).astype(np.float32),
        "timeouts": np.arange(1, rows + 1) % length == 0,
    }
    columns["terminals"] = columns["rewards"] == 1
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file[key] = column
    return path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all the processes of this session of pytest: what is dear is made once for all, under a lock."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_data(shared_folder: Path) -> Callable[[str, str], Path]:
    """`tiny_data(env, dataset)`: the folder that holds tiny data of that environment, made at most once."""

    def make(env_name: str, dataset: str) -> Path:
        made = shared_folder / f"{env_name}-{dataset}.made"
        with FileLock(made.with_suffix(".lock")):
            if not made.exists():
                (shared_folder / "data").mkdir(exist_ok=True)
                write_tiny_data(env_name, dataset, shared_folder / "data")
                made.touch()
        return shared_folder / "data"

    return make


@pytest.fixture
def point_data(tiny_data: Callable[[str, str], Path]) -> Path:
    """Folder with tiny pointmaze data: the cheapest environment."""
    return tiny_data("pointmaze-medium", "navigate")


@pytest.fixture(scope="session")
def finished_run(tiny_data: Callable[[str, str], Path], shared_folder: Path) -> Callable[..., Path]:
    """`finished_run(*overrides)`: the folder of a tiny pointmaze run, trained at most once, with short episodes.

    It is everybody's: a test reads it, and works on a copy of whatever it changes.
    """

    def make(*overrides: str) -> Path:
        folder = shared_folder / "runs" / ("_".join(overrides).replace("/", ".") or "joint")
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "summary.json").exists():
                data = tiny_data("pointmaze-medium", "navigate")
                with pytest.MonkeyPatch.context() as monkeypatch:
                    shorten_episodes(monkeypatch)
                    train(tiny_config(data, "experiment=pointmaze", *overrides), folder)
        return folder

    return make


def shorten_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give episodes 20 steps."""
    make_env = ogbench.make_env
    monkeypatch.setattr(ogbench, "make_env", lambda name, **kw: make_env(name, **({"max_episode_steps": 20} | kw)))


@pytest.fixture
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation episodes of 20 steps."""
    shorten_episodes(monkeypatch)


@pytest.fixture
def rendered() -> None:
    """Asked for by a test of pictures: they are rendered, not only put together."""


@pytest.fixture(autouse=True)
def pictures_are_only_put_together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering its two pictures is two thirds of what a tiny run costs, and matplotlib's business."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: Path(path).touch())


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """A test ends with whatever it started: what is left is killed, and the test is at fault."""
    yield
    left = kill_left_over()
    assert not left, f"left running: {left}"


@pytest.fixture(autouse=True, scope="session")
def working_tree_untouched() -> Iterator[None]:
    """No test writes into the repository."""
    before = working_tree()
    yield
    assert not (new := working_tree() - before), f"written by tests: {sorted(map(str, new))}"


def working_tree() -> set[Path]:
    """The repository's files, but for caches, hidden folders and what is installed there."""
    found = set()
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and not n.endswith(("cache__", ".egg-info"))]
        found |= {Path(folder, name) for name in names}
    return found


@pytest.fixture(scope="session")
def trained(tiny_data: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to be read."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    make_env = ogbench.make_env
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ogbench, "make_env", lambda name, **kw: make_env(name, **({"max_episode_steps": 20} | kw)))
        train(tiny_config(tiny_data("pointmaze-medium", "navigate"), "experiment=pointmaze"), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder, to be changed; all but its summary is done, so that it can be resumed."""
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns(SUMMARY_FILE)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are faster on one thread, and two processes share the cores of a test machine."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
