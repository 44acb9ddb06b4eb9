"""A run's folder: who may begin or go on in it, and what is taken away again if nothing comes of the run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from deflow.description import commit
from deflow.errors import UserError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"  # the resolved configuration
COMMAND_MARK = "# begun by: "  # before the command that began the run, in the first line of that file
METRICS_FILE = "metrics.csv"
REPORT_FILE = "report.png"
SUMMARY_FILE = "summary.json"  # written last: a run that has it is finished
CHECKPOINTS = "checkpoints"
LAST, FINAL = "last.ckpt", "final.ckpt"  # of a stage: the newest checkpoint on the way, and that of its end
REPLAY = "replay"
EPISODES_FILE = "episodes.json"  # of the last evaluation
LOG_FILE = "train.log"
LOCK_FILE, HOLDER_FILE = ".lock", ".holder"
SWEEP_FILE = "multirun.yaml"  # that Hydra writes before it looks at a sweep's jobs
COMMITS_FILE = ".commits"  # of the code of the processes that made the run, a line each

SIGNS_OF_A_RUN = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CHECKPOINTS)

# All that can be there of a run that has not made its first update.
BEFORE_THE_FIRST_UPDATE = (
    *(CONFIG_FILE, METRICS_FILE, LOG_FILE, LOCK_FILE, HOLDER_FILE, COMMITS_FILE, "mlflow_run_id"),
    *(CHECKPOINTS, REPLAY, "tensorboard", "wandb"),
)

_new: set[Path] = set()  # folders that this process has made, also through Hydra
_made_for_them: set[Path] = set()  # folders that those lie in


def new_run_folder(root: str, name: str, resume: str | None) -> str:
    """`root/name/date_time`, made here so that no other run takes it, with a number behind it if one has; or `resume`.

    Raises:
        UserError: if `resume` is not a run, or the folder cannot be made.
    """
    if resume is not None:
        if not resume:
            raise UserError("resume= names no folder of a run")
        if not (Path(resume) / CONFIG_FILE).is_file():  # before Hydra makes a folder of that name
            raise UserError(f"{resume} is not a run to resume: it has no {CONFIG_FILE}")
        return resume
    folder = Path(root) / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    mine, number, tries = folder, 1, 3
    while True:
        missing = _missing(mine)
        try:
            mine.mkdir(parents=True)
            _remember(missing)
            return str(mine)
        except (FileExistsError, NotADirectoryError) as error:
            if not mine.is_dir():
                raise _unusable(mine, error) from error
            number += 1  # of a run that began in the same second, perhaps at this very moment
            mine = folder.with_name(f"{folder.name}-{number}")
        except OSError as error:
            # Another command that is refused at this very moment may have removed the folder above.
            if isinstance(error, FileNotFoundError) and (tries := tries - 1):
                continue
            raise _unusable(mine, error) from error


def is_requeued(folder: Path) -> bool:
    """Whether SLURM has queued this job again, after a preemption, say, and it had begun the run in `folder`."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and (folder / CONFIG_FILE).is_file()


def notice_new(folder: Path) -> None:
    """Remember whether a run's folder, or that of a sweep, is new: called before Hydra makes it."""
    _remember(_missing(folder))


def is_new(folder: Path) -> bool:
    """Whether this process has made a folder, or one that it lies in."""
    folder = _plain(folder)
    return bool(_new & {folder, *folder.parents})


def _plain(folder: Path) -> Path:
    """The absolute path without `..`, as Hydra says it."""
    return Path(os.path.abspath(folder))


def _missing(folder: Path) -> list[Path]:
    """The folder and those that it lies in, as far as they are not there."""
    folder = _plain(folder)
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remember(missing: Sequence[Path]) -> None:
    _new.update(missing[:1])
    _made_for_them.update(missing[1:])


def _remove_empty(folder: Path) -> None:
    """Remove a folder, and those that were made for it, as far as they are empty."""
    folder = _plain(folder)
    with suppress(OSError):  # there is something in it
        if folder.exists():
            folder.rmdir()
        for parent in folder.parents:
            if parent not in _new | _made_for_them:
                break
            parent.rmdir()


@contextmanager
def leaving_no_empty(folder: Path) -> Iterator[None]:
    """Remove the folder that Hydra has made for a command if an error comes before there is anything in it."""
    try:
        yield
    except BaseException:
        if is_new(folder):
            _remove_empty(folder)
        raise


@contextmanager
def leaving_no_unused_sweep() -> Iterator[None]:
    """Remove the folder that Hydra has made for a sweep if an error comes and there is nothing of a job in it."""
    try:
        yield
    except BaseException:
        for folder in tuple(_new):
            if [path.name for path in folder.glob("*")] == [SWEEP_FILE]:
                (folder / SWEEP_FILE).unlink()
                _remove_empty(folder)
        raise


class RunFolder:
    """Holds a run's folder while it is used as a context; in the other processes of a run it does nothing.

    Args:
        path: of the folder, made if it is missing.
        resume: whether to go on with the run in it.

    Raises:
        UserError: on entering, if the folder holds a run and `resume` is false, if another process is at work in it,
            or if it cannot be written to.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self._resume = path, resume
        self._lock = FileLock(path / LOCK_FILE, timeout=0)
        self._names_before: set[str] = set()
        self._made = False

    def __enter__(self) -> RunFolder:
        from deflow.distributed import is_main_process  # brings in torch, which a command's mistakes need not wait for

        if not is_main_process():
            return self
        found = [name for name in SIGNS_OF_A_RUN if (self.path / name).exists()]
        if found and not self._resume:
            raise UserError(
                f"{self.path} holds a run already: go on with it by resume={self.path}, or name another folder"
            )
        notice_new(self.path)
        self._made = is_new(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._names_before = {path.name for path in self.path.iterdir()}
            self._lock.acquire()
            (self.path / HOLDER_FILE).write_text(json.dumps(_me()))
            self._note_commit()
        except Timeout as error:
            raise UserError(f"{self.path} is in use by {self._holder()}: wait for it, or stop it") from error
        except OSError as error:
            raise _unusable(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._lock.is_locked:
            (self.path / HOLDER_FILE).unlink(missing_ok=True)
            self._lock.release()

    def _note_commit(self) -> None:
        """Now, because the clone may be another one when the run ends."""
        before = commits_of(self.path) or (["unknown"] if self._resume else [])
        if commit() not in ("", *before[-1:]):
            (self.path / COMMITS_FILE).write_text("\n".join([*before, commit()]))

    def discard(self) -> None:
        """Remove what a run that did not get to its first update has written: by name, and nothing that was there."""
        if not self._lock.is_locked:
            return
        of_ranks = [path.name for path in self.path.glob("train_ddp_process_*.log")]  # Lightning's name for the job
        for name in (*BEFORE_THE_FIRST_UPDATE, *of_ranks):
            path = self.path / name
            if name in self._names_before:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self._made:
            _remove_empty(self.path)

    def _holder(self) -> str:
        try:
            holder = json.loads((self.path / HOLDER_FILE).read_text())
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun
            return "another process"


def commits_of(folder: Path) -> list[str]:
    """The code that made a run, in the order of its processes; empty if that was no clone, or nobody noted it."""
    file = folder / COMMITS_FILE
    return file.read_text().split("\n") if file.exists() else []


def read_summary(path: Path) -> dict[str, Any] | None:
    """What `summary.json` says of a finished run; None if there is none, or (which is said) a damaged one."""
    if not path.exists():
        return None
    summary = parsed_summary(path.read_bytes())
    if summary is None:
        log.warning("%s is damaged: it is made anew", path)
    return summary


def parsed_summary(text: bytes) -> dict[str, Any] | None:
    """What a `summary.json` holds; None if it is damaged."""
    try:
        summary = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(summary, dict) and {"agent", "task", "seed", "seeds", "data", "protocol"} <= summary.keys()
    return summary if whole else None


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot use {folder} as a run's folder: {error.strerror or error}")
