"""The real configurations, composed and then shrunk; tiny data for every environment, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from deflow.config import CONFIG_DIR
from deflow.data.d4rl import SIZES
from deflow.envs import ogbench

EPISODES, STEPS = 4, 40

# Everything that costs time, made small.
TINY = (
    "networks.hidden=[16,16]",
    "updates=6",
    "eval.every=3",
    "eval.episodes=2",
    "eval.num_envs=2",
    "validate_every=3",
    "checkpoint_every=2",
    "data.batch_size=8",
    "data.validation_batches=2",
    "trainer.log_every_n_steps=2",
    "logger=csv",
    "video.episodes=0",
    "diversity.states=4",
    "diversity.samples=4",
    "diversity.neighbours=4",
    "threads=1",
)


def compose_config(*overrides: str, config_name: str = "train", **more: Any) -> DictConfig:
    """The composed configuration, as the command line would give it."""
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
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`tiny_data(env, dataset)`: the folder that holds tiny data of that environment, made at most once."""
    folder = tmp_path_factory.mktemp("data")
    made: set[tuple[str, str]] = set()

    def make(env_name: str, dataset: str) -> Path:
        if (env_name, dataset) not in made:
            write_tiny_data(env_name, dataset, folder)
            made.add((env_name, dataset))
        return folder

    return make


@pytest.fixture
def point_data(tiny_data: Callable[[str, str], Path]) -> Path:
    """Folder with tiny pointmaze data: the cheapest environment."""
    return tiny_data("pointmaze-medium", "navigate")


@pytest.fixture
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation episodes of 20 steps."""
    make_env = ogbench.make_env
    monkeypatch.setattr(ogbench, "make_env", lambda name, **kw: make_env(name, **({"max_episode_steps": 20} | kw)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors are faster on one thread, and two processes share the cores of a test machine."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
