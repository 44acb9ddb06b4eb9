"""A run from beginning to end: prepare, train every stage, finish."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from deflow import report
from deflow.errors import UserError
from deflow.finishing import finish
from deflow.invocation import typed
from deflow.preparation import prepare
from deflow.run_folder import CONFIG_FILE, SUMMARY_FILE, RunFolder, is_requeued, read_summary
from deflow.signals import Stopped
from deflow.stored import load_config
from deflow.training import run_stages
from deflow.trust import as_arguments, trust_only

Again = Callable[[Sequence[str]], str]  # arguments -> the command with them, as the user would type it
TRAIN = partial(typed, "train")


def train(config: DictConfig, folder: Path, again: Again = TRAIN) -> dict[str, Any]:
    """Train every stage that is not done yet, evaluate, and leave the report in `folder`.

    Args:
        config: of the run; with `resume`, or in a job that SLURM queued again, that in `folder` is taken instead.
        folder: of the run.
        again: says by what command the run goes on if it is stopped.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: for whatever the user can mend; a new run that fails before its first update leaves nothing behind.
    """
    trust_only(config.trust)
    resume = config.resume is not None or is_requeued(folder)
    if resume:
        summary = read_summary(folder / SUMMARY_FILE)
        if summary is not None:
            report.print_table(summary, folder)
            return summary
        config = load_config(folder / CONFIG_FILE)
    with RunFolder(folder, resume) as held:
        run = None
        try:
            run = prepare(config, folder, resume)
            run_stages(run)
            return finish(run)
        except BaseException as error:
            nothing_done = not resume and (run is None or run.first_update_at is None)
            if nothing_done:
                held.discard()
            go_on = f"go on by {again([f'resume={folder}', *as_arguments()])}"
            _advise(error, folder, nothing_done, go_on)
            raise


def _advise(error: BaseException, folder: Path, nothing_done: bool, go_on: str) -> None:
    """Let an error that ends a run say how to go on."""
    if isinstance(error, Stopped):
        error.advice = "before the first update" if nothing_done else go_on
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise UserError(f"cannot write into {folder}: {error.strerror}; mend that, then {go_on}") from error
