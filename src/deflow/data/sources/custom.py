"""Data of one's own: an .npz or .hdf5 file with one row a transition and column names that the configuration maps."""

from __future__ import annotations

import importlib.util
import logging
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from deflow.data.memory.transitions import Transitions, as_arrays
from deflow.data.sources.columns import Arrays, checked_columns
from deflow.data.sources.shards import map_shards
from deflow.data.sources.source import BEYOND, Source, compact, split
from deflow.envs.success import SuccessRule
from deflow.errors import UserError
from deflow.ranges import Count, Interval, Seed
from deflow.types import Spec
from deflow.units import Numbers, Units

HDF5_SUFFIXES = (".hdf5", ".h5")
SUFFIXES = (".npz", *HDF5_SUFFIXES)
REQUIRED = ("observations", "actions", "rewards")
OPTIONAL = ("terminals", "timeouts", "next_observations")

SMALLEST_STD = 1e-6

log = logging.getLogger(__name__)


@dataclass
class CustomSource(Source):
    """Transitions from a file of the user's.

    Args:
        path: `.npz`, `.hdf5` or `.h5` file, or a folder of them, which are unpacked there once and mapped into memory.
        keys: name of each column in the file. `observations`, `actions` and `rewards` must be there; `terminals` (the
            task truly ended: do not bootstrap), `timeouts` (the trajectory was cut there) and `next_observations`
            may be null. Without `next_observations` a trajectory's last state has no successor and is dropped.
        env: gymnasium id of the environment for evaluation; null trains without evaluation.
        max_episode_steps: after which an episode is cut; null leaves that to the environment.
        success_key: what of `info` says whether an episode succeeded; null: `success` or `is_success`.
        success_ever: whether success at any step counts, and not only at the last.
        action_range: [lowest, highest] action, which the policy decides as -1 and 1; null takes actions as they are, in
            [-1, 1]; `auto`: the bounds of the environment's actions, or without one the data's if they go beyond 1.
        standardise: whether networks see observations less the data's mean, over its standard deviation.
        seed: of the validation split, a tenth of the trajectories.
    """

    path: str
    keys: Mapping[str, str | None]
    env: str | None = None
    max_episode_steps: Count | None = None
    success_key: str | None = None
    success_ever: bool = False
    action_range: Literal["auto"] | Interval | None = "auto"
    standardise: bool = False
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
        return sorted(path for path in self._path.glob("*") if path.suffix.lower() in SUFFIXES)

    def arrays(self) -> tuple[Arrays, None]:
        if self._path.is_file():
            return self._read(self._path), None
        return as_arrays(self._mapped()), None

    def load(self) -> tuple[Transitions, Transitions | None]:
        if self._path.is_file():
            return super().load()
        return split(self.with_units(self._mapped()), self.seed, self.name)

    def with_units(self, whole: Transitions) -> Transitions:
        low, high = self._range(whole)
        units = Units(low, high, *(_moments(whole) if self.standardise else (None, None)))
        whole = replace(whole, units=units)
        return super().with_units(whole)

    def _range(self, whole: Transitions) -> tuple[Numbers, Numbers] | tuple[None, None]:
        """What the policy decides as -1 and as 1, a number a dimension; None, if these are -1 and 1."""
        size = whole.actions.shape[1]
        if self.action_range is None:
            return None, None
        if self.action_range != "auto":
            return (float(self.action_range[0]),) * size, (float(self.action_range[1]),) * size
        if self.has_env:
            env = self.make_env()
            space = env.action_space
            env.close()
            if isinstance(space, Box) and space.is_bounded():
                return _unless_one(space.low.reshape(-1), space.high.reshape(-1))
        taken = whole.actions[whole.starts]
        if taken.abs().max() <= 1 + BEYOND:
            return None, None
        return _unless_one(taken.amin(0).numpy(), taken.amax(0).numpy())

    def spec(self) -> Spec:
        self.prepare()
        columns = self._read(self._shards[0])
        return Spec(columns["observations"].shape[1], columns["actions"].shape[1])

    def _mapped(self) -> Transitions:
        """All files of the folder, mapped into memory."""
        settings = {"keys": {ours: theirs for ours, theirs in self.keys.items() if theirs is not None}}

        def load(path: Path) -> Transitions:
            return self.transitions(self._read(path), str(path))

        return map_shards(self._shards, load, self._path / "unpacked", settings)

    def _read(self, path: Path) -> Arrays:
        """One file in compact layout."""
        columns = read_columns(path, self.keys)
        nowhere = np.zeros(len(columns["rewards"]), bool)
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
            columns["rewards"],
            1.0 - terminals.astype(np.float32),
            terminals | timeouts,
            columns.get("next_observations"),
        )

    @property
    def success(self) -> SuccessRule:  # type: ignore[override]
        return SuccessRule(self.success_key, self.success_ever)

    @property
    def has_env(self) -> bool:
        return self.env is not None

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        try:
            return gymnasium.make(self.env or "", max_episode_steps=self.max_episode_steps, **kwargs)
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


def _unless_one(low: np.ndarray, high: np.ndarray) -> tuple[Numbers, Numbers] | tuple[None, None]:
    if (low == -1).all() and (high == 1).all():
        return None, None
    log.info("actions from %s to %s are decided as -1 to 1", low.tolist(), high.tolist())
    return tuple(low.tolist()), tuple(high.tolist())


def _moments(whole: Transitions) -> tuple[Numbers, Numbers]:
    """Mean and standard deviation of the states, a number a dimension."""
    states = whole.states[whole.starts].double()
    return tuple(states.mean(0).tolist()), tuple(states.std(0).clamp(min=SMALLEST_STD).tolist())


def read_columns(path: Path, keys: Mapping[str, str | None]) -> Arrays:
    """The named columns of an `.npz` or HDF5 file, checked; columns that say where trajectories end and are not named
    are said.

    Args:
        path: of the file.
        keys: our name -> the file's (with `/` for groups of HDF5), or None for a column the file does not have.

    Raises:
        UserError: if the file is of another kind, broken or lacks a column, or as `checked_columns` does.
    """
    wanted = {ours: theirs for ours, theirs in keys.items() if theirs is not None}
    missing = [key for key in REQUIRED if key not in wanted]
    if missing:
        raise UserError(f"data.source.keys must name {', '.join(missing)}")
    columns, present = (_read_hdf5 if path.suffix.lower() in HDF5_SUFFIXES else _read_npz)(path, wanted)
    unused = [name for name in OPTIONAL if name in present and name not in wanted.values()]
    if unused:
        named = " ".join(f"data.source.keys.{name}={name}" for name in unused)
        log.warning("%s: its columns %s are not read; to read them: %s", path, ", ".join(unused), named)
    return checked_columns(columns, str(path))


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
        raise UserError(
            f"{path} holds objects, such as episodes of different lengths: put them one after the other, one row a "
            "transition, and say in terminals and timeouts where they end"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"cannot read {path}: it is truncated or not an .npz file") from error


def _read_hdf5(path: Path, wanted: Mapping[str, str]) -> tuple[Arrays, list[str]]:
    if importlib.util.find_spec("h5py") is None:
        raise UserError("HDF5 files need the package h5py: pip install 'deflow[d4rl]'")
    import h5py

    try:
        with h5py.File(path) as file:
            names: list[str] = []
            file.visit(names.append)
            _check_present(path, wanted, names)
            return {ours: np.asarray(file[theirs]) for ours, theirs in wanted.items()}, names
    except OSError as error:
        raise UserError(f"cannot read {path}: it is truncated or not an HDF5 file") from error


def _check_present(path: Path, wanted: Mapping[str, str], present: list[str]) -> None:
    missing = [theirs for theirs in wanted.values() if theirs not in present]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(present))}")
