"""Data of one's own: an .npz or .hdf5 file with one row a transition and column names that the configuration maps."""

from __future__ import annotations

import importlib.util
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import Arrays, Source, compact, split
from deflow.errors import UserError
from deflow.ranges import Seed
from deflow.types import Spec

HDF5_SUFFIXES = (".hdf5", ".h5")
SUFFIXES = (".npz", *HDF5_SUFFIXES)
REQUIRED = ("observations", "actions", "rewards")


@dataclass
class CustomSource(Source):
    """Transitions from a file of the user's.

    Args:
        path: `.npz`, `.hdf5` or `.h5` file, or a folder of them, which are unpacked there once and mapped into memory.
        keys: name of each column in the file. `observations`, `actions` and `rewards` must be there; `terminals` (the
            task truly ended: do not bootstrap), `timeouts` (the trajectory was cut there) and `next_observations`
            may be null. Without `next_observations` a trajectory's last state has no successor and is dropped.
        env: gymnasium id of the environment for evaluation; null trains without evaluation.
        seed: of the validation split, a tenth of the trajectories.
    """

    path: str
    keys: Mapping[str, str | None]
    env: str | None = None
    seed: Seed = 0

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def task(self) -> str:
        return self.env or self.name

    @property
    def _path(self) -> Path:
        return Path(self.path).expanduser()

    def prepare(self) -> None:
        if not self._shards:
            raise UserError(f"data.source.path: no file {self._path}, or no {' or '.join(SUFFIXES)} files in it")

    @property
    def _shards(self) -> list[Path]:
        if self._path.is_file():
            return [self._path]
        return sorted(path for path in self._path.glob("*") if path.suffix in SUFFIXES)

    def arrays(self) -> tuple[Arrays, Arrays]:
        return self._arrays_of(self._shards[0])

    def load(self) -> tuple[Transitions, Transitions]:
        if self._path.is_file():
            return super().load()
        reading = {"keys": dict(self.keys), "seed": self.seed}
        return self.load_shards(self._shards, self._arrays_of, self._path / "unpacked", reading)

    def spec(self) -> Spec:
        self.prepare()
        train, _ = self.arrays()
        return Spec(train["observations"].shape[1], train["actions"].shape[1])

    def _arrays_of(self, path: Path) -> tuple[Arrays, Arrays]:
        columns = read_columns(path, self.keys)
        terminals = columns.get("terminals", np.zeros(len(columns["rewards"]), bool)).astype(bool)
        timeouts = columns.get("timeouts", np.zeros_like(terminals)).astype(bool)
        if not terminals.any() and not timeouts.any() and "next_observations" not in columns:
            raise UserError(
                f"{path}: nothing says where trajectories end; name a column in data.source.keys "
                "(terminals, timeouts or next_observations)"
            )
        arrays = compact(
            columns["observations"],
            columns["actions"],
            columns["rewards"],
            1.0 - terminals.astype(np.float32),
            terminals | timeouts,
            columns.get("next_observations"),
        )
        return split(arrays, self.seed)

    @property
    def has_env(self) -> bool:
        return self.env is not None

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        try:
            return gymnasium.make(self.env or "", **kwargs)
        except Exception as error:  # what is registered under a name may raise anything
            raise UserError(f"data.source.env: cannot make {self.env}: {error}") from error

    def protocol(self) -> dict[str, Any]:
        return {"protocol": "the user's own data" + (f", evaluated in {self.env}" if self.env else "")}

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self._path),
            "bytes": sum(path.stat().st_size for path in self._shards),
            "generated": False,
        }


def read_columns(path: Path, keys: Mapping[str, str | None]) -> Arrays:
    """The named columns of an `.npz` or HDF5 file, checked for equal length.

    Args:
        path: of the file.
        keys: our name -> the file's (with `/` for groups of HDF5), or None for a column the file does not have.

    Raises:
        UserError: if the file is of another kind, broken or lacks a column.
    """
    wanted = {ours: theirs for ours, theirs in keys.items() if theirs is not None}
    missing = [key for key in REQUIRED if key not in wanted]
    if missing:
        raise UserError(f"data.source.keys must name {', '.join(missing)}")
    columns = _read_hdf5(path, wanted) if path.suffix in HDF5_SUFFIXES else _read_npz(path, wanted)
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{path}: columns of different lengths ({lengths})")
    flat = [key for key in ("observations", "actions") if columns[key].ndim != 2]
    if flat:
        raise UserError(f"{path}: {', '.join(flat)} must have two axes (rows, size)")
    return columns


def _read_npz(path: Path, wanted: Mapping[str, str]) -> Arrays:
    try:
        with np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz of columns")
            _check_present(path, wanted, file.files)
            return {ours: file[theirs] for ours, theirs in wanted.items()}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UserError(f"cannot read {path}: it is truncated or not an .npz file") from error


def _read_hdf5(path: Path, wanted: Mapping[str, str]) -> Arrays:
    if importlib.util.find_spec("h5py") is None:
        raise UserError("HDF5 files need the package h5py: pip install 'deflow[d4rl]'")
    import h5py

    try:
        with h5py.File(path) as file:
            names: list[str] = []
            file.visit(names.append)
            _check_present(path, wanted, names)
            return {ours: np.asarray(file[theirs]) for ours, theirs in wanted.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: it is truncated or not an HDF5 file") from error


def _check_present(path: Path, wanted: Mapping[str, str], present: list[str]) -> None:
    missing = [theirs for theirs in wanted.values() if theirs not in present]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(present))}")
