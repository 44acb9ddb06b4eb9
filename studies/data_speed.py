"""How fast the data's tools are: IAV of 100,000 states, and updates from memory-mapped shards against memory.

python studies/data_speed.py DIR/antmaze-medium-navigate-v0.npz    prints both; the shards go to a temporary folder
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from deflow.build import build_agent
from deflow.config import CONFIG_DIR
from deflow.data.measures.iav import intrinsic_action_variance
from deflow.data.memory.transitions import Transitions
from deflow.data.streams import BatchStream
from deflow.timing import seconds_of_updates
from deflow.types import Lookahead, Spec

STATES, SHARDS, ROUNDS, UPDATES = 100_000, 5, 7, 400


def time_iav(path: Path) -> None:
    """Seconds of the exact search over the first `STATES` states."""
    with np.load(path) as file:
        states, actions = file["observations"][:STATES], file["actions"][:STATES]
    started = time.perf_counter()
    result = intrinsic_action_variance(states, actions, 5)
    seconds = time.perf_counter() - started
    print(f"IAV of {result.states} states, {states.shape[1]} dimensions: {seconds:.1f} s, {result.mean:.4f}")


def time_shards(path: Path) -> None:
    """Updates/s of a behaviour flow from memory and from shards, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(path, Path(folder))
        sources = [load(path), load(Path(folder))]
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("medium")
        (memory, config), (mapped, _) = sources
        agent = build_agent(config.agent, Spec(memory.states.shape[1], memory.actions.shape[1]))
        rounds = [[seconds_of_updates(agent, stream(data)) for data in (memory, mapped)] for _ in range(ROUNDS + 1)][1:]
    ratio = median(a / b for a, b in rounds)
    speeds = [UPDATES / median(seconds) for seconds in zip(*rounds, strict=True)]
    print(f"updates/s in memory {speeds[0]:.0f}, mapped {speeds[1]:.0f}, ratio {ratio:.2f}")


def write_shards(path: Path, folder: Path) -> None:
    """The file's trajectories in `SHARDS` files, none split."""
    for suffix in ("", "-val"):
        with np.load(path.with_name(f"{path.stem}{suffix}.npz")) as file:
            arrays = dict(file)
        ends = np.flatnonzero(arrays["terminals"]) + 1
        cuts = [0, *(int(part[-1]) for part in np.array_split(ends, SHARDS))]
        for number in range(SHARDS):
            part = {key: column[cuts[number] : cuts[number + 1]] for key, column in arrays.items()}
            np.savez(folder / f"{path.stem}-{number:03d}{suffix}.npz", **part)


def load(path: Path) -> tuple[Transitions, DictConfig]:
    overrides = ["experiment=antmaze_medium", "agent=flow_bc", "networks.hidden=[256,256,256]", "name=none"]
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose("train", overrides=[*overrides, f"data.source.path={path}"])
    return instantiate(config.data.source).load()[0], config


def stream(data: Transitions) -> BatchStream:
    return BatchStream(data, 256, 0, UPDATES, (0, "speed"), Lookahead(discount=0.99))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    time_iav(Path(sys.argv[1]))
    time_shards(Path(sys.argv[1]))
