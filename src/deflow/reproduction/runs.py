"""The runs of a plan: each in a process of its own, several at a time, none twice."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from joblib import Parallel, delayed

from deflow.errors import UserError
from deflow.reproduction.plan import Job, missing_datasets

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # of Linux' prctl

_running: set[subprocess.Popen[bytes]] = set()  # commands that this process has started


def generate_missing(jobs: Sequence[Job]) -> None:
    """Make the data that the runs need and that are not there.

    Raises:
        UserError: if that failed, naming its log.
    """
    for dataset in missing_datasets(jobs):
        log.info("generating %s", dataset.path)
        dataset.path.parent.mkdir(parents=True, exist_ok=True)
        output = dataset.path.with_suffix(".log")
        if _run("generate", dataset.arguments, output) and not dataset.path.exists():  # another's, meanwhile
            raise UserError(f"{dataset.name} could not be generated: see {output}")


def run_all(jobs: Sequence[Job], at_once: int, threads: int) -> list[str]:
    """Do what is not done yet; a run that fails leaves the others alone.

    Args:
        jobs: of a plan.
        at_once: runs side by side.
        threads: of torch, in each.

    Returns:
        What is to be said of those that are not done now.
    """
    todo = [job for job in jobs if job.state != "done"]
    outcomes = Parallel(n_jobs=at_once, backend="threading")(delayed(do)(job, threads) for job in todo)
    return [outcome for outcome in outcomes if outcome is not None]


def do(job: Job, threads: int, apart: bool = False) -> str | None:
    """Begin a run, or go on with it, in a process of its own.

    Args:
        job: the run.
        threads: of torch.
        apart: whether signals to this process's group are not the run's.

    Returns:
        What is to be said of it, unless it is done.
    """
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(job.folder.with_suffix(".lock"), timeout=0):
            state = job.state
            if state == "done":
                return None
            log.info("%s %s", "going on:" if state == "begun" else "training:", job.name)
            if state == "missing":
                job.made_by.write_text("\n".join(job.settings))
            status = _run("train", job.arguments(threads), job.output, apart)
    except Timeout:
        return f"{job.name} is at work in another process"
    except (OSError, subprocess.SubprocessError) as error:  # of this run alone, such as a full disk
        return f"{job.name} could not be made ({error})"
    return f"{job.name} failed, see {job.output}" if status else None


def stop_running() -> None:
    """End what this process has started; a run writes a checkpoint first. Signal handlers may call it."""
    for process in _running:
        process.send_signal(signal.SIGTERM)
        with suppress(ChildProcessError):  # it has ended, and been waited for
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # `process.wait` may be what was interrupted


def _run(command: str, arguments: Sequence[str], output: Path, apart: bool = False) -> int:
    """The exit status of a `deflow` command; it ends with this process, whatever ends that."""
    typed = [sys.executable, "-m", "deflow", command, *arguments]
    with output.open("ab") as file:
        process = subprocess.Popen(
            typed, stdout=file, stderr=file, process_group=0 if apart else None, **_tied_to_this_process()
        )
        _running.add(process)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
            _running.discard(process)


def _tied_to_this_process() -> dict[str, Any]:
    """On Linux the kernel sends SIGTERM to a run whose parent is gone: the run then writes a checkpoint and ends."""
    if sys.platform != "linux":
        return {}
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def ask() -> None:  # between fork and exec, where nothing may be imported
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went before it was asked
            os._exit(1)

    return {"preexec_fn": ask}
