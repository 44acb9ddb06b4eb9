"""Data larger than memory: many files, unpacked once into memory-mapped columns."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import track

from deflow.data.memory.transitions import Transitions
from deflow.errors import UserError
from deflow.files import check_folder, locked, replacing

log = logging.getLogger(__name__)

INDEX = "index.json"  # which shards the columns were made of and how, and their shapes; written last
FORMAT = 2  # of the columns; those of the first had no action in the row of a last state
LABELS = ("rewards", "masks")
COLUMNS = tuple(field.name for field in fields(Transitions) if field.default is MISSING)


def map_shards(
    shards: Sequence[Path],
    load: Callable[[Path], Transitions],
    folder: Path,
    settings: Mapping[str, Any],
    labels: bool = False,
) -> Transitions:
    """The transitions of all `shards` as columns mapped into memory, of which only what is read is in memory.

    The columns lie in `folder` and take the size of the unpacked data on disk. They are made by the first process that
    asks, one shard in memory at a time, and made again when they are damaged, a shard has been replaced, added or
    removed, or they were read with other settings.

    Args:
        shards: files, in order.
        load: reads one of them.
        folder: of the columns, made if missing.
        settings: with which `load` reads them, in plain values.
        labels: whether the settings decide on rewards and masks alone; the folders beside `folder` are then of the same
            shards with other labels, and what they have in common is on disk once.

    Raises:
        UserError: if the shards are not of one kind.
    """
    check_folder(folder, "data.source.path")
    with locked(folder / "lock", "the unpacked shards"):
        index, now = _read_index(folder), _identities(shards)
        key = json.loads(json.dumps({"format": FORMAT, **settings}))  # as it comes from a file
        if index is None or index["shards"] != now or index.get("settings") != key:
            if index is not None:
                log.warning("%s: unpacking anew", _difference(index["shards"], now))
            index = _unpack(shards, load, folder, key, _columns_beside(folder, now) if labels else {})
    columns = {}
    for name in COLUMNS:
        dtype, shape = index["columns"][name]
        # Mapped copy-on-write: torch wants memory that it may write to; nothing ever does.
        columns[name] = torch.from_numpy(np.memmap(folder / f"{name}.bin", np.dtype(dtype), "c", shape=tuple(shape)))
    return Transitions(**cast(Any, columns))


def _difference(before: Sequence[Any], now: Sequence[Any]) -> str:
    changed = sorted({name for name, *_ in before} ^ {name for name, *_ in now})
    changed += [name for name, *identity in now if [name, *identity] not in before and name not in changed]
    if changed:
        return f"shards changed since they were unpacked ({', '.join(changed)})"
    return "shards were unpacked with other settings"


def _columns_beside(folder: Path, shards: list[list[Any]]) -> dict[str, Path]:
    """Columns without labels that a folder beside this one has of the same shards."""
    for other in sorted(folder.parent.glob(f"*/{INDEX}")):
        index = None if other.parent == folder else _read_index(other.parent)
        if index is not None and index["shards"] == shards and index.get("settings", {}).get("format") == FORMAT:
            return {name: other.with_name(f"{name}.bin") for name in COLUMNS if name not in LABELS}
    return {}


def _unpack(
    shards: Sequence[Path],
    load: Callable[[Path], Transitions],
    folder: Path,
    settings: dict[str, Any],
    there: Mapping[str, Path],
) -> dict[str, Any]:
    """Write the columns but for those that are `there` already, which are linked."""
    (folder / INDEX).unlink(missing_ok=True)
    rows, shapes = 0, {name: 0 for name in COLUMNS}
    first: dict[str, tuple[Any, ...]] = {}
    with ExitStack() as stack:
        # Renamed at the end: a process that has the old columns mapped keeps them.
        paths = {name: stack.enter_context(replacing(folder / f"{name}.bin")) for name in COLUMNS}
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items() if name not in there}
        for name, path in there.items():
            _link(path, paths[name])
        for shard in track(shards, description=f"unpacking {len(shards)} shards"):
            part = load(shard)
            kinds = {name: (str(getattr(part, name).dtype), *getattr(part, name).shape[1:]) for name in COLUMNS}
            _check_alike(first := first or kinds, kinds, shard)
            for name in COLUMNS:
                column = getattr(part, name).numpy()
                shapes[name] += len(column)
                if name in files:
                    files[name].write((column + rows if name == "starts" else column).tobytes())
            rows += len(part.states)
    columns = {}
    for name in COLUMNS:
        column = getattr(part, name)
        columns[name] = [str(column.numpy().dtype), [shapes[name], *column.shape[1:]]]
    index = {"shards": _identities(shards), "columns": columns, "settings": settings}
    with replacing(folder / INDEX) as part_of_index:
        part_of_index.write_text(json.dumps(index))
    return index


def _link(there: Path, here: Path) -> None:
    """The same file under another name, or a copy where a file system has no such thing."""
    here.unlink(missing_ok=True)  # left by a kill
    try:
        os.link(there, here)
    except OSError:
        shutil.copyfile(there, here)


def _check_alike(first: dict[str, tuple[Any, ...]], kinds: dict[str, tuple[Any, ...]], shard: Path) -> None:
    for name, kind in kinds.items():
        if kind != first[name]:
            raise UserError(f"{shard}: its {name} are {kind}, those of the files before it {first[name]} (type, sizes)")


def _identities(shards: Sequence[Path]) -> list[list[Any]]:
    """Name, size and time of the last change of each file."""
    return [[shard.name, shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards]


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index of columns that are there and whole; None if there are none."""
    if not (folder / INDEX).exists():
        return None
    try:
        index = json.loads((folder / INDEX).read_text())
        index["shards"] = [[str(name), *identity] for name, *identity in index["shards"]]
        if all(_is_whole(folder / f"{name}.bin", *index["columns"][name]) for name in COLUMNS):
            return index
    except (OSError, ValueError, KeyError, TypeError):  # not JSON, or not ours
        pass
    log.warning("the columns in %s are damaged: unpacking anew", folder)
    return None


def _is_whole(column: Path, dtype: str, shape: Sequence[int]) -> bool:
    """Whether the file holds so many numbers."""
    of_numbers = np.dtype(dtype).kind in "fiu"  # mapped as Python objects, the bytes of a file would be addresses
    return of_numbers and column.stat().st_size == np.dtype(dtype).itemsize * math.prod(shape)
