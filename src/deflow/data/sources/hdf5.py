"""HDF5 files, opened so that whatever is wrong with them is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deflow.errors import UserError
from deflow.extras import require

if TYPE_CHECKING:
    import h5py


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading.

    Raises:
        UserError: if h5py is missing, or the file cannot be read, now or inside the block.
    """
    require("an HDF5 file", "h5py")
    import h5py

    try:
        with h5py.File(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: it is truncated or not an HDF5 file") from error
