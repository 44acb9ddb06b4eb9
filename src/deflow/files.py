"""Writing files so that a kill loses nothing: replaced whole, or only ever appended to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from deflow.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, with its suffix, to write to; renamed to `path` at the end, removed on an error.

    The folder is made if it is missing. The content is on the disk before the name is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
