"""Hydra's side of the house: resolvers, one-line errors, checks that need the whole configuration."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deflow.errors import UserError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"  # the resolved configuration in a run's folder
CONFIG_DIR = str(Path(__file__).resolve().parents[2] / "configs")


def new_run_folder(root: str, name: str, resume: str | None) -> str:
    """`root/name/date_time`, made here so that no other run takes it, with a number behind it if one has; or `resume`.

    Raises:
        UserError: if `resume` is not a run.
    """
    if resume is not None:
        if not (Path(resume) / CONFIG_FILE).is_file():  # before Hydra makes a folder of that name
            raise UserError(f"{resume} is not a run to resume: it has no {CONFIG_FILE}")
        return resume
    folder = Path(root) / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    mine, number = folder, 1
    while True:
        try:
            mine.mkdir(parents=True)
            return str(mine)
        except FileExistsError:  # of a run that began in the same second, perhaps at this very moment
            number += 1
            mine = folder.with_name(f"{folder.name}-{number}")


OmegaConf.register_new_resolver("run_folder", new_run_folder, use_cache=True, replace=True)


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig, Path], Any]], Callable[[], None]]:
    """Turn `main(config, run_folder)` into a command: Hydra composes the configuration, errors become one line.

    Exit status: 2 for an error of the user's, 1 (with a traceback) for one of ours.
    """

    def decorate(main: Callable[[DictConfig, Path], Any]) -> Callable[[], None]:
        @hydra.main(version_base=None, config_path=CONFIG_DIR, config_name=config_name)
        def composed(config: DictConfig) -> None:
            with _errors_in_one_line():  # here and not only outside, or Hydra prints a line of its own
                main(config, Path(HydraConfig.get().runtime.output_dir))

        @wraps(main)
        def command() -> None:
            # A group inside a group is overridden with a slash; the dot of every other override is what fingers type.
            sys.argv[1:] = [re.sub(r"^agent\.(\w+)=(?=[a-z]\w*$)", _as_group, argument) for argument in sys.argv[1:]]
            # Hydra prints its errors over many lines unless it is told to raise them.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            with _errors_in_one_line():
                composed()

        return command

    return decorate


def _as_group(match: re.Match[str]) -> str:
    """`agent.critic=` as `agent/critic=`, if there is such a group."""
    return f"agent/{match[1]}=" if (Path(CONFIG_DIR) / "agent" / match[1]).is_dir() else match[0]


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):  # Hydra wraps what a component raises
            cause = cause.__cause__
        print(f"error: {_one_line(cause or error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}': choose one of {', '.join(sorted(error.options))}"
    while not str(error) and error.__cause__ is not None:  # Hydra's wrapper of a grammar error says nothing itself
        error = error.__cause__
    message = str(error).removeprefix("UserError raised while resolving interpolation: ").partition("\n    full_key")[0]
    return re.sub(r"\s+", " ", message).strip()


def refuse_other_overrides(key: str) -> None:
    """A run that is resumed keeps its own configuration; whatever else is asked for would be silently lost.

    Raises:
        UserError: if the command line has overrides other than `key` and `trust`.
    """
    allowed = (f"{key}=", "trust=")  # what a file may name is not the file's to say
    others = [override for override in HydraConfig.get().overrides.task if not override.startswith(allowed)]
    if others:
        raise UserError(f"{key}= keeps the run's own configuration: drop {' '.join(others)}")


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, loadable without OmegaConf."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check(config: DictConfig) -> None:
    """Checks that no single component can make.

    Raises:
        UserError: for stages without steps, intervals below 1, several seeds where they cannot be stacked,
            a precision that cannot be compared, or nothing to compile with.
    """
    if not config.stages:
        raise UserError("no stages: choose stages=joint or stages=staged")
    for name, stage in config.stages.items():
        if stage.steps < 1:
            raise UserError(f"stages.{name}.steps must be at least 1, got {stage.steps}")
    for key in ("eval.every", "checkpoint_every", "validate_every"):
        if OmegaConf.select(config, key) < 1:
            raise UserError(f"{key} must be at least 1, got {OmegaConf.select(config, key)}")
    if config.seeds < 1:
        raise UserError(f"seeds must be at least 1, got {config.seeds}")
    online = any(stage.get("environment") is not None for stage in config.stages.values())
    if config.seeds > 1 and (online or config.trainer.devices != 1):
        raise UserError("seeds > 1 trains on data alone and in one process: train the seeds one by one")
    if config.trainer.precision == "auto" and (config.trainer.accelerator, config.trainer.devices) != ("cpu", 1):
        raise UserError("trainer.precision=auto compares on trainer=cpu alone: choose 32-true or bf16-mixed")
    if config.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("compile=true needs a C++ compiler: install g++, or name another in CXX")
