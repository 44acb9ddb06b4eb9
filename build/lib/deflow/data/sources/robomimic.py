"""robomimic's HDF5 files: a group a demonstration (https://robomimic.github.io/docs/datasets/overview.html)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deflow.data.sources.columns import Arrays, checked_columns, flags
from deflow.data.sources.hdf5 import opened
from deflow.data.sources.own_data import OwnDataSource
from deflow.data.sources.source import compact
from deflow.errors import UserError
from deflow.ranges import Names
from deflow.types import Spec

if TYPE_CHECKING:
    import h5py

TRAIN, VALIDATION = "train", "valid"  # filter keys that make a split

log = logging.getLogger(__name__)


@dataclass
class RobomimicSource(OwnDataSource):
    """Demonstrations from a robomimic file, each of them a trajectory.

    `dones` end the task, and a demonstration ends with its last row. The filter keys `mask/train` and `mask/valid` are
    the split if both are there. `next_obs` may be missing: then the last state of a demonstration that did not end its
    task has no successor and is dropped.

    Args:
        path: of the `.hdf5` file.
        observation_keys: of `obs`, concatenated in this order; null: all that are no images, sorted.
        env, max_episode_steps, success_key, success_ever, action_range, standardise, seed: see `OwnDataSource`.
    """

    observation_keys: Names | None = None

    @property
    def _files(self) -> list[Path]:
        return [self._path]

    def prepare(self) -> None:
        if not self._path.is_file():
            raise UserError(f"data.source.path: no file {self._path}; set it to a robomimic .hdf5 file")

    def arrays(self) -> tuple[Arrays, Arrays | None]:
        with opened(self._path) as file:
            keys, demonstrations = self._keys(file), self._demonstrations(file)
            train, validation = self._split(file, demonstrations)
            splits = self._read(file, train, keys), self._read(file, validation, keys) if validation else None
            self._say(file["data"][demonstrations[0]]["obs"], keys)
            return splits

    def _say(self, columns: h5py.Group, keys: list[str]) -> None:
        others = sorted(set(columns) - set(keys))
        left_out = [f"{key} (images)" if columns[key].ndim > 2 else key for key in others]
        log.info(
            "%s: observations are %s; left out: %s",
            *(self._path, ", ".join(keys), ", ".join(left_out) or "nothing"),
        )

    def spec(self) -> Spec:
        self.prepare()
        with opened(self._path) as file:
            first = self._read(file, self._demonstrations(file)[:1], self._keys(file))
        return Spec(*_sizes(first))

    def provenance(self) -> dict[str, Any]:
        with opened(self._path) as file:
            return super().provenance() | {"observation_keys": self._keys(file)}

    def _demonstrations(self, file: h5py.File) -> list[str]:
        """Their names, in the order of their numbers."""
        names = list(file["data"]) if "data" in file else []
        if not names:
            raise UserError(f"{self._path} is no robomimic file: it has no demonstrations (groups data/demo_0, ...)")
        return sorted(names, key=lambda name: (len(name), name))

    def _keys(self, file: h5py.File) -> list[str]:
        if self.observation_keys is not None:
            return list(self.observation_keys)
        first = self._demonstrations(file)[0]
        columns = _member(file, f"data/{first}/obs", str(self._path))
        found = sorted(key for key in columns if columns[key].ndim <= 2)
        if not found:
            raise UserError(f"{self._path}: its observations ({', '.join(columns)}) are images, which are not read")
        return found

    def _split(self, file: h5py.File, names: list[str]) -> tuple[list[str], list[str] | None]:
        filters = file.get("mask", {})
        train, validation = ([name.decode() for name in filters.get(key, ())] for key in (TRAIN, VALIDATION))
        if not train or not validation:
            return names, None
        missing = sorted({*train, *validation} - set(names))
        if missing:
            raise UserError(f"{self._path}: its filter keys name {missing[0]}, which is not in the file")
        unused = len(set(names) - {*train, *validation})
        log.info(
            "%s: its filter keys %s and %s are the split; %d demonstrations are in neither and not read",
            *(self._path, TRAIN, VALIDATION, unused),
        )
        return train, validation

    def _read(self, file: h5py.File, names: list[str], keys: list[str]) -> Arrays:
        """Demonstrations in compact layout."""
        parts = [_demonstration(file["data"][name], keys, f"{self._path}: {name}") for name in names]
        for name, part in zip(names, parts, strict=True):
            if _sizes(part) != _sizes(parts[0]):
                raise UserError(
                    f"{self._path}: {name} has the (observation, action) sizes {_sizes(part)}, {names[0]} has "
                    f"{_sizes(parts[0])}"
                )
        return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def _demonstration(group: h5py.Group, keys: list[str], origin: str) -> Arrays:
    columns = {name: np.asarray(_member(group, name, origin)) for name in ("actions", "rewards", "dones")}
    columns["observations"] = _concatenated(group, "obs", keys, origin)
    columns = checked_columns(columns, origin)
    observations = columns["observations"]
    successors = None
    if "next_obs" in group:  # of which only the last row is news
        last = _concatenated(group, "next_obs", keys, origin)[-1:]
        successors = np.concatenate([observations[1:], last])
    return compact(
        observations,
        columns["actions"],
        columns["rewards"],
        1.0 - flags(columns["dones"], "dones", origin).astype(np.float32),
        np.arange(len(observations)) == len(observations) - 1,
        successors,
    )


def _concatenated(group: h5py.Group, kind: str, keys: list[str], origin: str) -> np.ndarray:
    columns = [np.asarray(_member(group, f"{kind}/{key}", origin)) for key in keys]
    columns = [column[:, None] if column.ndim == 1 else column for column in columns]
    for key, column in zip(keys, columns, strict=True):
        if column.ndim != 2 or len(column) != len(columns[0]):
            raise UserError(
                f"{origin}: '{kind}/{key}' has the shape {column.shape}; an observation key has one row of numbers a "
                "step, as many rows as the others, and images are not read (data.source.observation_keys)"
            )
    return np.concatenate(columns, axis=1)


def _member(group: h5py.Group, name: str, origin: str) -> Any:
    parent, _, _ = name.rpartition("/")
    if parent and parent not in group:
        return _member(group, parent, origin)
    if name not in group:
        there = group[parent] if parent else group
        raise UserError(
            f"{origin} lacks {name}, it has {', '.join(sorted(there))}; robomimic's dataset_states_to_obs.py adds "
            "observations, rewards and dones"
        )
    return group[name]


def _sizes(arrays: Arrays) -> tuple[int, int]:
    return arrays["observations"].shape[1], arrays["actions"].shape[1]
