"""LeRobot's data sets: both layouts are read alike, and what ends a task and what it earns is told by the set."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from deflow.data.sources.lerobot import LeRobotSource
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.types import Spec
from tests.conftest import tiny_config

EPISODES, LENGTH = 12, 5
ENDS = np.arange(LENGTH - 1, EPISODES * LENGTH, LENGTH)


def feature(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "names": None}


FEATURES = {
    "observation.state": feature("float32", 3),
    "observation.force": feature("float32", 1),
    "action": feature("float32", 2),
    "episode_index": feature("int64", 1),
    "frame_index": feature("int64", 1),
}
VIDEO = {"observation.images.top": feature("video", 480, 640, 3)}
OPTIONAL = {"next.reward": "float32", "next.done": "bool", "next.success": "bool"}


def columns(episode: int) -> dict[str, Any]:
    """The numbers `100 e + t` in frame `t` of episode `e`; as the format has it, no lists where the size is 1."""
    values = (100.0 * episode + np.arange(LENGTH)).astype(np.float32)
    last = np.arange(LENGTH) == LENGTH - 1
    return {
        "observation.state": fixed(np.stack([values] * 3, 1)),
        "observation.force": pyarrow.array(-values),
        "action": fixed(np.full((LENGTH, 2), 0.5, np.float32)),
        "episode_index": pyarrow.array([episode] * LENGTH),
        "frame_index": pyarrow.array(range(LENGTH)),
        "next.reward": pyarrow.array(values),
        "next.done": pyarrow.array(last & (episode % 3 == 0)),
        "next.success": pyarrow.array((np.arange(LENGTH) == LENGTH - 2) & (episode % 2 == 0)),
    }


def fixed(rows: np.ndarray) -> pyarrow.Array:
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), rows.shape[1])


def write(folder: Path, *optional: str, version: str = "v3.0", extra: dict[str, Any] = VIDEO) -> Path:
    features = FEATURES | {name: feature(OPTIONAL[name], 1) for name in optional}
    tables = [
        pyarrow.table({name: column for name, column in columns(episode).items() if name in features})
        for episode in range(EPISODES)
    ]
    chunk = folder / "data" / "chunk-000"
    chunk.mkdir(parents=True)
    (folder / "meta").mkdir()
    if version.startswith("v2"):
        for episode, table in enumerate(tables):
            parquet.write_table(table, chunk / f"episode_{episode:06d}.parquet")
    else:  # several episodes a file, which need not be in order
        parquet.write_table(pyarrow.concat_tables(tables[7:]), chunk / "file-000.parquet", row_group_size=4)
        parquet.write_table(pyarrow.concat_tables(tables[:7]), chunk / "file-001.parquet")
    info = {"codebase_version": version, "total_episodes": EPISODES, "total_frames": EPISODES * LENGTH}
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"features": features | extra}))
    return folder


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_are_trajectories(version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = LeRobotSource(
        str(write(tmp_path / "set.v1", version=version)), observation_keys=["observation.force", "observation.state"]
    )
    source.prepare()
    with caplog.at_level(logging.INFO):
        arrays, _ = source.arrays()
    assert (source.name, source.spec()) == ("set.v1", Spec(4, 2))
    assert "observation.images.top are left out" in caplog.text
    assert "neither rewards nor next.success: every episode counts as a success" in caplog.text
    starts = np.flatnonzero(arrays["valids"])
    values = (100.0 * np.arange(EPISODES)[:, None] + np.arange(LENGTH)).ravel()
    assert np.array_equal(arrays["observations"][starts], np.stack([-values, values, values, values], 1))
    assert (np.diff(arrays["observations"][:, 1])[starts[np.isin(np.arange(60), ENDS, invert=True)]] == 1).all()
    assert np.flatnonzero(arrays["rewards"][starts]).tolist() == ENDS.tolist()
    assert np.flatnonzero(arrays["masks"][starts] == 0).tolist() == ENDS.tolist()


@pytest.mark.parametrize(
    ("optional", "successful"),
    [
        (("next.success",), range(0, EPISODES, 2)),
        (("next.success", "next.done", "next.reward"), range(0, EPISODES, 2)),
        (("next.done", "next.reward"), range(0, EPISODES, 3)),
        (("next.reward",), ()),
        (("next.done",), range(EPISODES)),
    ],
)
def test_the_task_ends_where_an_episode_succeeded(
    optional: tuple[str, ...], successful: range, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = LeRobotSource(str(write(tmp_path / "set", *optional)))
    arrays, _ = source.arrays()
    assert (source.protocol()["rewards"] == "next.reward") == ("next.reward" in optional)
    starts = arrays["valids"] > 0
    ends = starts & (arrays["masks"] == 0)
    assert (arrays["observations"][ends, 0] // 100).tolist() == list(successful)
    assert (arrays["observations"][ends, 0] % 100 == LENGTH - 1).all()
    if "next.reward" in optional:
        assert np.array_equal(arrays["rewards"][starts], arrays["observations"][starts, 0])
    else:
        assert np.array_equal(arrays["rewards"] == 1, ends)
    # Where an episode was cut its last state is only a successor.
    assert starts.sum() == EPISODES * LENGTH - (EPISODES - len(successful))
    assert ("nothing says where the task ended" in caplog.text) == (optional == ("next.reward",))


def rewrite(folder: Path, name: str, column: pyarrow.Array | None) -> None:
    path = folder / "data" / "chunk-000" / "episode_000003.parquet"
    table = parquet.read_table(path)
    place = table.column_names.index(name)
    table = table.remove_column(place) if column is None else table.set_column(place, name, column)
    parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("action", None, r"episode_000003\.parquet lacks action"),
        ("action", fixed(np.zeros((LENGTH, 3))), "'action' has rows of 3 numbers, its info.json says 2"),
        ("action", pyarrow.array([[1, 2], [1], [1, 2], None, [1]]), "'action' has rows of 2 and 1 and None numbers"),
        ("action", pyarrow.array(["a"] * LENGTH), "'action' must hold numbers, got string"),
        ("observation.force", pyarrow.array(["a"] * LENGTH), r"'observation\.force' must hold numbers, got string"),
        ("action", pyarrow.array([1.0] * LENGTH), "'action' has rows of 1 numbers, its info.json says 2"),
        ("frame_index", pyarrow.array([0, 1, 2, 4, 5]), "the frames of episode 3 do not count 0, 1, 2"),
        ("episode_index", pyarrow.array([4] * LENGTH), "the frames of episode 4 do not count"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, column: pyarrow.Array | None, says: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", version="v2.1")
    rewrite(folder, name, column)
    with pytest.raises(UserError, match=says):
        LeRobotSource(str(folder), observation_keys=["observation.force"]).arrays()


def test_actions_in_degrees_are_scaled(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", version="v2.1")
    rewrite(folder, "action", fixed(np.stack([90.0 * np.arange(LENGTH), np.full(LENGTH, 0.5)], 1)))
    train_part, _ = LeRobotSource(str(folder)).load()
    assert train_part.units[:2] == ((0.0, -0.5), (360.0, 1.5))
    decided = train_part.units.decided(train_part.actions.numpy())
    assert np.isfinite(decided).all()
    assert np.abs(decided).max() == 1


def test_what_is_missing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "set", version="v2.1")
    with pytest.raises(UserError, match=r"lacks nothing\.here; it has action, episode_index"):
        LeRobotSource(str(folder), observation_keys=["nothing.here"]).arrays()
    with pytest.raises(UserError, match=r"'observation\.images\.top' is not of one axis"):
        LeRobotSource(str(folder), observation_keys=["observation.images.top"]).arrays()
    with pytest.raises(UserError, match=r"is no LeRobot data set, .*info\.json is missing"):
        LeRobotSource(str(tmp_path)).prepare()
    with pytest.raises(UserError, match=r"version v1\.6 of LeRobot's format is not read"):
        LeRobotSource(str(write(tmp_path / "old", version="v1.6"))).prepare()
    (folder / "data" / "chunk-000" / "episode_000011.parquet").unlink()
    LeRobotSource(str(folder)).arrays()
    assert "55 frames are there, its info.json says 60" in caplog.text
    (folder / "data" / "chunk-000" / "episode_000010.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="truncated or not a parquet file"):
        LeRobotSource(str(folder)).arrays()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^data=lerobot needs the package pyarrow: pip install pyarrow$"):
        LeRobotSource(str(folder)).prepare()


class Reach(gymnasium.Env):
    """Three numbers that add up the actions, for ever."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return np.zeros(3, np.float32), 0.0, False, False, {"reached": self._steps == 2}


def test_trains_and_evaluates(tmp_path: Path) -> None:
    gymnasium.register("Reach-v0", Reach)
    environment = ("env=Reach-v0", "max_episode_steps=4", "success_key=reached", "success_ever=true")
    folder = write(tmp_path / "set", "next.success")
    overrides = [f"data.source.{setting}" for setting in (f"path={folder}", *environment)]
    summary = train(tiny_config(tmp_path, "experiment=custom", "data=lerobot", *overrides), tmp_path / "run")
    assert summary["eval/success"]["last"] == 1
    assert summary["data"]["observation_keys"] == ["observation.state"]
