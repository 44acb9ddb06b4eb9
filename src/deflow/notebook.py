"""Training from a notebook or a program: what the command does, with exceptions and without `sys.exit`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from deflow.checks import check_command
from deflow.command_line import OF_THE_USER, look_in_own_folder, one_line, readable, refuse_other_overrides
from deflow.config import CONFIG_DIR
from deflow.errors import UserError
from deflow.imports import quick_imports
from deflow.run_folder import leaving_no_empty
from deflow.signals import Stopped, listening


def train(experiment: str, *overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Train, evaluate and report a policy, as `deflow train experiment=... overrides...` does.

    `deflow.train("antmaze", "seed=1")` begins a run; `deflow.train("resume=FOLDER")` goes on with one.

    Args:
        experiment: name of an experiment; with a "=" in it, it is one more override.
        overrides: what the command takes behind it, such as "agent=fql".
        config_dir: folder of configurations of your own, as the command's --config-dir.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: for whatever the user can mend.
        KeyboardInterrupt: if the run was stopped, by Ctrl-C or a signal; it says how the run goes on.
    """
    arguments = [experiment if "=" in experiment else f"experiment={experiment}", *overrides]
    with _errors_as_exceptions(arguments), listening():
        look_in_own_folder(config_dir)
        config, folder = _checked([readable(argument) for argument in arguments])
        with leaving_no_empty(folder):
            with quick_imports():
                from deflow import pipeline
            return pipeline.train(config, folder, _again)


def _checked(arguments: Sequence[str]) -> tuple[DictConfig, Path]:
    """What the command would get; a new run's folder is made last."""
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose("train", overrides=list(arguments), return_hydra_config=True)
    job = config.hydra
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    check_command(config, job, "train")
    if config.resume is not None:
        refuse_other_overrides(arguments)
    elif config.trainer.devices != 1:  # Lightning starts the others by a command line, and a notebook has none
        raise UserError("a run of several processes is started by a command: deflow train experiment=... trainer=ddp")
    return config, Path(job.run.dir)


def _again(arguments: Sequence[str]) -> str:
    """The call with these arguments."""
    return f"deflow.train({', '.join(map(json.dumps, arguments))})"


@contextmanager
def _errors_as_exceptions(arguments: Sequence[str]) -> Iterator[None]:
    """Make one of `UserError` and `KeyboardInterrupt` of what a command would print in one line."""
    try:
        yield
    except UserError:
        raise
    except OF_THE_USER as error:
        raise UserError(one_line(error, "train", arguments)) from error
    except Stopped as stop:
        raise KeyboardInterrupt(str(stop)) from stop
