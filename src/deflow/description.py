"""What a tracker is told of a run: its name, its tags and the settings that a person varies."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# What decides how a policy learns. The rest says where a run lies and how it is watched.
VARIED = (
    *("seed", "seeds", "task_id", "updates", "online_updates", "tau"),
    *("agent", "networks", "solver", "stages", "data", "trainer.precision"),
)
NOT_VARIED = ("data.source", "data.validation_batches")  # of these, what does not


@dataclass(frozen=True)
class Description:
    """What is told of one run.

    Args:
        name: agent, seed and task, as in "deflow seed 0 cube-single-play". The task comes last because columns and
            legends cut off what is long, and runs that are compared are most often of one task.
        tags: agent, task, data set, whether it was generated here, stages, version, commit, and the run's folder.
        settings: dotted name -> value, see `varied`.
    """

    name: str
    tags: dict[str, str]
    settings: dict[str, Any]


def describe(config: DictConfig, task: str, data: dict[str, Any], folder: Path) -> Description:
    """The description of a run.

    Args:
        config: of the run, with its interpolations.
        task: the source's name of it.
        data: what the source says of where its data came from.
        folder: of the run.
    """
    agent = _agent(config)
    tags = {
        "agent": agent,
        "task": task,
        "dataset": str(data["name"]),
        "generated": str(bool(data["generated"])).lower(),
        "stages": ", ".join(map(str, config.stages)),
        "version": version("deflow"),
        "folder": str(folder.absolute()),
    }
    made_by = commit()
    return Description(
        name=f"{agent} {_seeds(config)} {_short(task)}",
        tags=tags | ({"commit": made_by} if made_by else {}),
        settings=varied(config),
    )


def varied(config: DictConfig) -> dict[str, Any]:
    """Dotted name -> value of the settings that a person varies.

    These are the settings under `VARIED` that have a value of their own: not those that follow another one (`${...}`),
    are null or empty, or say how something is built (`_target_` and the like).
    """
    return {
        name: value
        for name, value in _own_values(config)
        if _is_under(name, VARIED) and not _is_under(name, NOT_VARIED) and value != []
    }


def _own_values(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, config):
        if key.startswith("_") or OmegaConf.is_interpolation(config, key) or OmegaConf.is_missing(config, key):
            continue
        value = config[key]
        if isinstance(value, DictConfig):
            yield from _own_values(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _is_under(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _agent(config: DictConfig) -> str:
    """The agent as it is chosen on the command line; one of the user's own by its class."""
    module, _, name = str(config.agent._target_).rpartition(".")
    return module.rpartition(".")[2] if module.startswith("deflow.agents.") else name


def _short(task: str) -> str:
    """OGBench's "cube-single-play-singletask-task3-v0" as "cube-single-play-task3"; other names as they are."""
    return re.sub("-singletask(.*)-v0$", r"\1", task)


def _seeds(config: DictConfig) -> str:
    first, count = config.seed, config.seeds
    return f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}"


@cache
def commit() -> str:
    """Git's name of the code when this was first asked, with "-dirty" if it was changed since; empty if no clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not to be asked
        return ""
