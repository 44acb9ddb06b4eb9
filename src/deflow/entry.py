"""Entry points: from a command line to a command's function, with errors in one line and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from deflow.checks import check_command
from deflow.command_line import (
    OF_THE_USER,
    config_dir_of,
    flags_of,
    look_in_own_folder,
    one_line,
    overrides_of,
    readable,
)
from deflow.config import CONFIG_DIR
from deflow.cores import set_threads, spin_briefly
from deflow.help import help_text
from deflow.imports import quick_imports
from deflow.invocation import as_script_and_as_typed
from deflow.run_folder import leaving_no_empty, leaving_no_unused_sweep, notice_new
from deflow.signals import Stopped, end_with_parent, listening

PARENT = "DEFLOW_PARENT"  # variable with the number of the process that starts others


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig, Path], Any]], Callable[[], None]]:
    """Turn `main(config, run_folder)` into a command: Hydra composes the configuration, errors become one line.

    Exit status: 2 for an error of the user's, 1 (with a traceback) for one of ours. The jobs of a sweep (`-m`) go on
    after one that fails; the status is then that of the worst.
    """

    def decorate(main: Callable[[DictConfig, Path], Any]) -> Callable[[], None]:
        sweep = Sweep()

        @hydra.main(version_base=None, config_path=CONFIG_DIR, config_name=config_name)
        def composed(config: DictConfig) -> None:
            job = HydraConfig.get()
            folder = Path(job.runtime.output_dir)
            if job.mode == RunMode.MULTIRUN:
                with sweep.job(job.overrides.task), leaving_no_empty(folder):
                    check_command(config, job, config_name)
                    set_threads(config.threads)
                    main(config, folder)
                return
            # Here and not only outside, or Hydra prints a line of its own.
            with _errors_in_one_line(), leaving_no_empty(folder):
                set_threads(config.threads)
                main(config, folder)

        @wraps(main)
        def command() -> None:
            # Hydra prints its errors over many lines unless it is told to raise them.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            spin_briefly()
            if "LOCAL_RANK" in os.environ:  # a process of several, started by Lightning or torchrun
                end_with_parent(int(os.environ.get(PARENT, os.getppid())))
            os.environ[PARENT] = str(os.getpid())  # for the processes that this one may start
            with _errors_in_one_line(config_name, sweep), listening(), leaving_no_unused_sweep():
                # Hydra by itself takes files from there and no tables, and they go last.
                look_in_own_folder(config_dir_of(sys.argv[1:]))
                overrides = [readable(argument) for argument in overrides_of(sys.argv[1:])]
                # Hydra's parser does not take a flag between two overrides.
                sys.argv[1:] = [*overrides, *flags_of(sys.argv[1:])]
                if {"--help", "-h"} & {*sys.argv}:
                    text = help_text(Path(CONFIG_DIR), config_name, overrides)
                    print(text.replace(*as_script_and_as_typed(config_name)))
                else:
                    composed()

        return command

    return decorate


class SettingsCheck(Callback):
    """What comes before Hydra makes a folder for a command: its configuration is checked; configs/hydra names it."""

    def on_run_start(self, config: DictConfig, **more: Any) -> None:
        with _errors_in_one_line(), _bugs_end_it(), quick_imports():
            job = config.hydra
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            check_command(own, job, more["config_name"])
            notice_new(Path(job.run.dir))

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        with _errors_in_one_line(), _bugs_end_it():
            notice_new(Path(config.hydra.sweep.dir))


class Sweep:
    """The jobs of a `-m` that were played in this process, and the errors of those that failed."""

    def __init__(self) -> None:
        self.jobs = 0
        self.errors: list[Exception] = []

    @contextmanager
    def job(self, overrides: Iterable[str]) -> Iterator[None]:
        """Say at once what fails, and let it go on to Hydra, which goes on to the next job."""
        self.jobs += 1
        try:
            yield
        except Exception as error:
            self.errors.append(error)
            if not isinstance(error, OF_THE_USER):
                traceback.print_exc()
            print(f"error: {' '.join(overrides)}: {one_line(error)}", file=sys.stderr)
            raise

    def end(self) -> None:
        """The last line, and the exit status."""
        print(f"error: {len(self.errors)} of {self.jobs} jobs failed", file=sys.stderr)
        sys.exit(2 if all(isinstance(error, OF_THE_USER) for error in self.errors) else 1)


@contextmanager
def _errors_in_one_line(command: str = "", sweep: Sweep | None = None) -> Iterator[None]:
    """End with a line and a status. Around the whole command: its name, and the jobs if it is a sweep."""
    try:
        yield
    except Exception as error:
        if sweep is not None and sweep.errors:
            sweep.end()
        if not isinstance(error, OF_THE_USER):
            raise
        print(f"error: {one_line(error, command, sys.argv[1:])}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if _is_another_process_of_a_run():
            # Lightning takes any status but 0 for a fault and kills the main process, which else would wait for ever.
            sys.exit(0 if stop.agreed else stop.status)
        print(stop, file=sys.stderr)
        sys.exit(stop.status)


@contextmanager
def _bugs_end_it() -> Iterator[None]:
    """End the command by an error in a callback, of which Hydra would make a warning and go on."""
    try:
        yield
    except OF_THE_USER:
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _is_another_process_of_a_run() -> bool:
    """Whether this is not rank 0, by the launchers' variables: nothing may be imported here, see `quick_imports`."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") != "0"
