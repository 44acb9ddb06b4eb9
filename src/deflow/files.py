"""Writing files so that a kill loses nothing: replaced whole, or only ever appended to."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from deflow.errors import UserError

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0  # after which a process that waits for another one says so


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, with its suffix, to write to; renamed to `path` at the end, removed on an error.

    The folder is made if it is missing. The content is on the disk before the name is.
    """
    with replacing_all([path]) as (part,):
        yield part


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Replace files that belong together: the first is renamed when the last is whole and on the disk.

    The last of `paths` is the one whose presence says that all are there: an older one is removed before the others
    are renamed, so that a kill never leaves it beside files of another time.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    parts = [path.with_name(f".part-{path.name}") for path in paths]
    try:
        yield parts
        for part in parts:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def refuse_to_replace(files: Sequence[Path]) -> None:
    """What took long to make is replaced only if the command line says so.

    Raises:
        UserError: naming those of `files` that are there.
    """
    there = [file.name for file in files if file.exists()]
    if there:
        raise UserError(f"{files[0].parent} holds {', '.join(there)}: choose another out=, or say overwrite=true")


@contextmanager
def locked(lock: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file `lock`, made if it is missing; whoever waits long for it says so, and waits on.

    Args:
        lock: of which only one process at a time is inside.
        purpose: what it is held for, as in "waiting for PURPOSE".

    Raises:
        UserError: if nothing can be written there.
    """
    file = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            log.warning("waiting for %s: another process holds %s", purpose, lock)
            file.acquire()
    except OSError as error:
        raise UserError(f"cannot write into {lock.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        file.release()


def open_to_append(path: Path, size: int, content: str) -> BinaryIO:
    """A file to append to after its first `size` bytes; what stands behind them is cut off. Made if it is missing.

    Raises:
        UserError: naming `content`, if there are not so many bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if size and (not path.exists() or path.stat().st_size < size):
        raise UserError(f"{path} lacks {content}: the run cannot be resumed")
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def sync(file: BinaryIO) -> None:
    """See to it that all that was written is on disk."""
    file.flush()
    os.fsync(file.fileno())


def check_folder(folder: Path, setting: str) -> None:
    """Whether files can be made in `folder`, or it can be made itself.

    Raises:
        UserError: naming `setting`, if it cannot.
    """
    path = folder.expanduser().absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{setting}: {path} is not a folder, choose another")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{setting}: nothing can be written into {path}, choose another folder")


def check_file(path: Path, setting: str) -> None:
    """Whether `path` can be made or replaced; `UserError`, naming `setting`, if it cannot."""
    if path.expanduser().is_dir():
        raise UserError(f"{setting}: {path} is a folder, name a file")
    check_folder(path.parent, setting)
