"""Data of one's own: an .npz or .hdf5 file with one row a transition and column names that the configuration maps."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deflow.data.memory.transitions import Transitions, as_arrays
from deflow.data.sources.columns import HOLDS_OBJECTS, Arrays, checked_columns
from deflow.data.sources.hdf5 import opened
from deflow.data.sources.own_data import OwnDataSource
from deflow.data.sources.shards import map_shards
from deflow.data.sources.source import compact, split
from deflow.errors import UserError
from deflow.types import Spec

HDF5_SUFFIXES = (".hdf5", ".h5")
SUFFIXES = (".npz", *HDF5_SUFFIXES)
REQUIRED = ("observations", "actions")
OPTIONAL = ("terminals", "timeouts", "next_observations")


log = logging.getLogger(__name__)


@dataclass
class CustomSource(OwnDataSource):
    """Transitions from a file of the user's.

    Args:
        path: `.npz`, `.hdf5` or `.h5` file, or a folder of them, which are unpacked there once and mapped into memory.
        keys: name of each column in the file. `observations` and `actions` must be there; `rewards` (if null, each
            is 0, for agents that imitate), `terminals` (the task truly ended: do not bootstrap), `timeouts` (the
            trajectory was cut there) and `next_observations` may be null. Without `next_observations` a trajectory's
            last state has no successor and is dropped.
        env, max_episode_steps, success_key, success_ever, action_range, standardise, seed: see `OwnDataSource`.
    """

    keys: Mapping[str, str | None]
    _said: set[str] = field(default_factory=set, repr=False)  # once, and not of every file

    def prepare(self) -> None:
        if not self._files:
            raise UserError(f"data.source.path: no file {self._path}, or no {' or '.join(SUFFIXES)} files in it")

    @property
    def _files(self) -> list[Path]:
        if self._path.is_file():
            return [self._path]
        return sorted(path for path in self._path.glob("*") if path.suffix.lower() in SUFFIXES)

    def arrays(self) -> tuple[Arrays, None]:
        if self._path.is_file():
            return self._read(self._path), None
        return as_arrays(self._mapped()), None

    def load(self) -> tuple[Transitions, Transitions | None]:
        if self._path.is_file():
            return super().load()
        return split(self.with_units(self._mapped()), self.seed, self.name)

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"columns": named(self.keys)}

    def spec(self) -> Spec:
        return self._sizes

    @cached_property
    def _sizes(self) -> Spec:
        self.prepare()
        columns = self._read(self._files[0])
        return Spec(columns["observations"].shape[1], columns["actions"].shape[1])

    def _mapped(self) -> Transitions:
        """All files of the folder, mapped into memory."""

        def load(path: Path) -> Transitions:
            return self.transitions(self._read(path), str(path))

        return map_shards(self._files, load, self._path / "unpacked", {"keys": named(self.keys)})

    def _read(self, path: Path) -> Arrays:
        """One file in compact layout."""
        columns, unread = read_columns(path, self.keys)
        self._say(path, unread)
        rows = len(columns["actions"])
        nowhere = np.zeros(rows, bool)
        terminals, timeouts = columns.get("terminals", nowhere), columns.get("timeouts", nowhere)
        # A file of a folder ends a trajectory; one that is all there is may hold many, and something must say which.
        if self._path.is_file() and not (terminals | timeouts).any() and "next_observations" not in columns:
            raise UserError(
                f"{path}: nothing says where trajectories end; name a column in data.source.keys "
                "(terminals, timeouts or next_observations)"
            )
        return compact(
            columns["observations"],
            columns["actions"],
            columns.get("rewards", np.zeros(rows, np.float32)),
            1.0 - terminals.astype(np.float32),
            terminals | timeouts,
            columns.get("next_observations"),
        )

    def _say(self, path: Path, unread: list[str]) -> None:
        new = [name for name in unread if name not in self._said]
        self._said.update(new)
        if new:
            settings = " ".join(f"data.source.keys.{name}={name}" for name in new)
            log.warning("%s: its columns %s are not read; to read them: %s", path, ", ".join(new), settings)


def read_columns(path: Path, keys: Mapping[str, str | None]) -> tuple[Arrays, list[str]]:
    """The named columns of an `.npz` or HDF5 file, checked.

    Args:
        path: of the file.
        keys: our name -> the file's (with `/` for groups of HDF5), or None for a column the file does not have.

    Returns:
        The columns, and the names of those that say where trajectories end, are there and are not read.

    Raises:
        UserError: if the file is of another kind, broken or lacks a column, or as `checked_columns` does.
    """
    wanted = named(keys)
    missing = [key for key in REQUIRED if key not in wanted]
    if missing:
        raise UserError(f"data.source.keys must name {', '.join(missing)}")
    columns, present = (_read_hdf5 if path.suffix.lower() in HDF5_SUFFIXES else _read_npz)(path, wanted)
    unread = [name for name in OPTIONAL if name in present and name not in wanted.values()]
    return checked_columns(columns, str(path)), unread


def named(keys: Mapping[str, str | None]) -> dict[str, str]:
    """The columns that the file has: our name -> the file's."""
    return {ours: theirs for ours, theirs in keys.items() if theirs is not None}


def _read_npz(path: Path, wanted: Mapping[str, str]) -> tuple[Arrays, list[str]]:
    try:
        with np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz of columns")
            _check_present(path, wanted, file.files)
            return {ours: file[theirs] for ours, theirs in wanted.items()}, file.files
    except ValueError as error:
        if not str(error).startswith("Object arrays"):
            raise UserError(f"cannot read {path}: it is truncated or not an .npz file") from error
        raise UserError(f"{path} {HOLDS_OBJECTS}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"cannot read {path}: it is truncated or not an .npz file") from error


def _read_hdf5(path: Path, wanted: Mapping[str, str]) -> tuple[Arrays, list[str]]:
    with opened(path) as file:
        names: list[str] = []
        file.visit(names.append)
        _check_present(path, wanted, names)
        return {ours: np.asarray(file[theirs]) for ours, theirs in wanted.items()}, names


def _check_present(path: Path, wanted: Mapping[str, str], present: list[str]) -> None:
    missing = [theirs for theirs in wanted.values() if theirs not in present]
    if missing:
        imitate = (
            "; to imitate without rewards: data.source.keys.rewards=null" if wanted.get("rewards") in missing else ""
        )
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(present))}{imitate}")
