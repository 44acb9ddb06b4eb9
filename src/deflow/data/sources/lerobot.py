"""LeRobot's data sets in a local folder, read without LeRobot: versions 2.x (a file an episode) and 3.x (several)."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow.data.sources.columns import Arrays, checked_columns, flags, with_one_axis
from deflow.data.sources.own_data import OwnDataSource
from deflow.data.sources.source import compact
from deflow.errors import UserError
from deflow.extras import require
from deflow.ranges import Names
from deflow.types import Spec

VERSIONS = ("v2.", "v3.")
ACTION, REWARD, DONE, SUCCESS = "action", "next.reward", "next.done", "next.success"
EPISODE, FRAME = "episode_index", "frame_index"

log = logging.getLogger(__name__)


@dataclass
class LeRobotSource(OwnDataSource):
    """Episodes from a LeRobot data set, each of them a trajectory.

    An episode succeeded if `next.success` is true in any of its frames. Where the set does not have it: without
    `next.reward` every episode did, with it those whose last frame has `next.done`. The task ends with the last frame
    of an episode that succeeded, and any other episode was cut, so that its last state has no successor and is dropped.
    Rewards are `next.reward`, or else 1 where the task ends and 0 before. Videos and images are left out.

    Args:
        path: folder with `meta/info.json` and `data/chunk-*/*.parquet`.
        observation_keys: features of one axis, concatenated in this order.
        env, max_episode_steps, success_key, success_ever, action_range, standardise, seed: see `OwnDataSource`.
    """

    observation_keys: Names = ("observation.state",)

    @property
    def _files(self) -> list[Path]:
        return sorted(self._path.glob("data/chunk-*/*.parquet"))

    def prepare(self) -> None:
        require("data=lerobot", "pyarrow")
        version = str(self._info().get("codebase_version"))
        if not version.startswith(VERSIONS):
            raise UserError(f"{self._path}: version {version} of LeRobot's format is not read, only v2.x and v3.x are")
        if not self._files:
            raise UserError(f"{self._path} lacks its data (data/chunk-*/*.parquet)")

    def _info(self) -> dict[str, Any]:
        file = self._path / "meta" / "info.json"
        try:
            return dict(json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise UserError(f"data.source.path: {self._path} is no LeRobot data set, {file} is missing") from error
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {file}: {error}") from error

    def _features(self) -> dict[str, dict[str, Any]]:
        """The features that are read: what each is called, and its `dtype` and `shape`."""
        features = self._info().get("features", {})
        wanted = [*self.observation_keys, ACTION, EPISODE, FRAME]
        missing = [name for name in wanted if name not in features]
        if missing:
            raise UserError(f"{self._path} lacks {', '.join(missing)}; it has {', '.join(sorted(features))}")
        wanted += [name for name in (REWARD, DONE, SUCCESS) if name in features]
        for name in wanted:
            if features[name]["dtype"] in ("video", "image") or len(features[name]["shape"]) != 1:
                raise UserError(f"{self._path}: '{name}' is not of one axis (data.source.observation_keys)")
        return {name: features[name] for name in wanted}

    def spec(self) -> Spec:
        self.prepare()
        sizes = {name: int(feature["shape"][0]) for name, feature in self._features().items()}
        return Spec(sum(sizes[name] for name in self.observation_keys), sizes[ACTION])

    def arrays(self) -> tuple[Arrays, None]:
        table = self._table()
        episodes, ends = self._episodes(table)
        terminals = ends & self._succeeded(table, episodes, ends)
        columns = checked_columns(
            {
                "observations": np.concatenate([table[name] for name in self.observation_keys], axis=1),
                "actions": table[ACTION],
                "rewards": table.get(REWARD, terminals.astype(np.float32)),
                "terminals": terminals,
            },
            str(self._path),
        )
        masks = 1.0 - columns["terminals"].astype(np.float32)
        return compact(columns["observations"], columns["actions"], columns["rewards"], masks, ends), None

    def _table(self) -> Arrays:
        """All frames in the order of episodes and time; each column of shape (rows, size)."""
        info, features = self._info(), self._features()
        left_out = [name for name, kind in info["features"].items() if kind["dtype"] in ("video", "image")]
        if left_out:
            log.info("%s: %s are left out, videos and images are not read", self._path, ", ".join(left_out))
        parts = [_read(path, features) for path in self._files]
        table = {name: np.concatenate([part[name] for part in parts]) for name in features}
        rows = len(table[FRAME])
        if rows != info.get("total_frames", rows):
            log.warning("%s: %d frames are there, its info.json says %d", self._path, rows, info["total_frames"])
        order = np.lexsort((table[FRAME][:, 0], table[EPISODE][:, 0]))
        return {name: column[order] for name, column in table.items()}

    def _episodes(self, table: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """The place of each frame's episode among all, and whether the frame ends it; of shape (rows,)."""
        index = with_one_axis(table[EPISODE], EPISODE, str(self._path))
        _, firsts, places, lengths = np.unique(index, return_index=True, return_inverse=True, return_counts=True)
        frames = np.arange(len(index)) - firsts[places]
        wrong = table[FRAME][:, 0] != frames
        if wrong.any():
            raise UserError(
                f"{self._path}: the frames of episode {index[wrong][0]} do not count 0, 1, 2 and so on: some are "
                "missing, or are there twice"
            )
        return places, frames == lengths[places] - 1

    def _succeeded(self, table: Arrays, episodes: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether the episode of each frame succeeded, shape (rows,)."""
        said = {name: flags(table[name], name, str(self._path)) for name in (DONE, SUCCESS) if name in table}
        if SUCCESS in said:
            of_episodes = np.bincount(episodes, said[SUCCESS]) > 0
            return of_episodes[episodes]
        if REWARD in table:
            if DONE not in said:
                log.warning("%s: nothing says where the task ended, so every episode counts as cut", self._path)
            return said.get(DONE, np.zeros(len(ends), bool))
        log.warning("%s has neither rewards nor %s: every episode counts as a success", self._path, SUCCESS)
        return np.ones(len(ends), bool)

    def protocol(self) -> dict[str, Any]:
        rewards = REWARD if REWARD in self._features() else "1 at the end of an episode that succeeded, else 0"
        return super().protocol() | {"rewards": rewards}

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"observation_keys": list(self.observation_keys)}


def _read(path: Path, features: dict[str, dict[str, Any]]) -> Arrays:
    """The features from one file, each of shape (rows, size)."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read(columns=list(features))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: it is truncated or not a parquet file") from error
    missing = [name for name in features if name not in table.column_names]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return {name: _numbers(table[name], int(kind["shape"][0]), name, path) for name, kind in features.items()}


def _numbers(column: Any, size: int, name: str, path: Path) -> np.ndarray:
    """A column of numbers, or of lists of `size` numbers, as an array of shape (rows, size)."""
    from pyarrow import compute, types

    is_list = any(kind(column.type) for kind in (types.is_list, types.is_large_list, types.is_fixed_size_list))
    type_ = column.type.value_type if is_list else column.type
    if not (types.is_floating(type_) or types.is_integer(type_) or types.is_boolean(type_)):
        raise UserError(f"{path}: '{name}' must hold numbers, got {type_}")
    values = column.combine_chunks()
    lengths = compute.unique(compute.list_value_length(values)).to_pylist() if is_list else [1]
    if any(length != size for length in lengths):
        found = " and ".join(map(str, lengths))
        raise UserError(f"{path}: '{name}' has rows of {found} numbers, its info.json says {size}")
    return (values.flatten() if is_list else values).to_numpy(zero_copy_only=False).reshape(len(column), size)
