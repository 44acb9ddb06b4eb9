"""robomimic's files: demonstrations are trajectories, dones end tasks, filter keys are the split."""

from __future__ import annotations

import logging
from pathlib import Path

import h5py
import numpy as np
import pytest

from deflow.data.sources.robomimic import RobomimicSource
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.types import Spec
from tests.conftest import tiny_config

LENGTHS = [3 + number for number in range(12)]


def write(path: Path, **masks: list[str]) -> Path:
    """Demonstration `e` has `3 + e` steps and the numbers `100 e + t` in step `t`; every second one is done."""
    with h5py.File(path, "w") as file:
        for number, length in enumerate(LENGTHS):
            demo = file.create_group(f"data/demo_{number}")
            values = 100.0 * number + np.arange(length + 1)
            for kind, rows in (("obs", values[:-1]), ("next_obs", values[1:])):
                demo[f"{kind}/eef"] = np.stack([rows, -rows], 1)
                demo[f"{kind}/gripper"] = 0.5 + rows  # one number a step, without an axis of its own
                demo[f"{kind}/camera_image"] = np.zeros((length, 4, 4, 3), np.uint8)
            demo["actions"] = np.full((length, 2), 0.5)
            demo["rewards"] = (np.arange(length) == length - 1).astype(float)
            demo["dones"] = demo["rewards"][:].astype(int) * (number % 2)
        for name, demos in masks.items():
            file[f"mask/{name}"] = np.array(demos, "S")
    return path


def change(path: Path, name: str, value: np.ndarray | None) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        if value is not None:
            file[name] = value


def test_demonstrations_are_trajectories(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = RobomimicSource(str(write(tmp_path / "low_dim.hdf5")))
    with caplog.at_level(logging.INFO):
        arrays, validation = source.arrays()
    assert validation is None
    assert "observations are eef, gripper; left out: camera_image (images)" in caplog.text
    assert source.spec() == Spec(3, 2)
    starts = np.flatnonzero(arrays["valids"])
    expected = np.concatenate([100.0 * number + np.arange(length) for number, length in enumerate(LENGTHS)])
    assert np.array_equal(arrays["observations"][starts], np.stack([expected, -expected, expected + 0.5], 1))
    assert np.array_equal(arrays["observations"][starts + 1, 0], expected + 1)  # the last state, too
    ends = np.cumsum(LENGTHS) - 1
    assert np.flatnonzero(arrays["masks"][starts] == 0).tolist() == ends[1::2].tolist()
    assert np.flatnonzero(arrays["rewards"][starts]).tolist() == ends.tolist()


def test_steps_that_are_far_apart_end_no_trajectory(tmp_path: Path) -> None:
    path = write(tmp_path / "low_dim.hdf5")
    change(path, "data/demo_11/next_obs/eef", np.full((14, 2), 7.0))
    arrays, _ = RobomimicSource(str(path)).arrays()
    assert (arrays["valids"] == 0).sum() == len(LENGTHS)
    assert arrays["observations"][-1, 0] == 7


def test_keys_are_concatenated_in_the_given_order(tmp_path: Path) -> None:
    path = str(write(tmp_path / "low_dim.hdf5"))
    arrays, _ = RobomimicSource(path, observation_keys=["gripper", "eef"]).arrays()
    assert arrays["observations"][0].tolist() == [0.5, 0, 0]
    assert RobomimicSource(path, observation_keys=["eef"]).spec() == Spec(2, 2)


def test_without_next_observations_the_state_in_which_a_demonstration_was_cut_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "low_dim.hdf5")
    for number in range(len(LENGTHS)):
        change(path, f"data/demo_{number}/next_obs", None)
    arrays, _ = RobomimicSource(str(path)).arrays()
    assert arrays["valids"].sum() == sum(LENGTHS) - 6
    assert (arrays["masks"][arrays["valids"] > 0] == 0).sum() == 6


def test_filter_keys_are_the_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "low_dim.hdf5", train=["demo_2", "demo_10"], valid=["demo_0"], few=["demo_1"])
    with caplog.at_level(logging.INFO):
        train_part, validation = RobomimicSource(str(path)).load()
    assert validation is not None
    numbers = [set((part.states[part.starts, 0] // 100).tolist()) for part in (train_part, validation)]
    assert numbers == [{2.0, 10.0}, {0.0}]
    assert "9 demonstrations are in neither" in caplog.text
    without = RobomimicSource(str(write(tmp_path / "b.hdf5", train=["demo_2"]))).load()
    assert sum(len(part) for part in without if part is not None) == sum(LENGTHS)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rewards", None, r"demo_1 lacks rewards, it has actions, dones, .*dataset_states_to_obs\.py"),
        ("obs/eef", None, "demo_1 lacks obs/eef, it has camera_image, gripper"),
        ("obs", None, "demo_1 lacks obs, it has actions, dones"),
        ("obs/eef", np.zeros((4, 5)), r"demo_1 has the \(observation, action\) sizes \(6, 2\), demo_0 has \(3, 2\)"),
        ("obs/eef", np.zeros((3, 2)), r"demo_1: 'obs/gripper' has the shape \(4, 1\).* as many rows as the others"),
        ("actions", np.zeros((3, 2)), "demo_1: columns of different lengths"),
        ("dones", np.full(4, np.nan), "demo_1: 'dones' must be 0 or 1"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, value: np.ndarray | None, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "low_dim.hdf5")
    change(path, f"data/demo_1/{name}", value)
    if "sizes" in says:
        change(path, f"data/demo_1/next_{name}", value)
    with pytest.raises(UserError, match=says):
        RobomimicSource(str(path)).arrays()


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none\.hdf5"):
        RobomimicSource(str(tmp_path / "none.hdf5")).prepare()
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        file["observations"] = np.zeros(3)
    with pytest.raises(UserError, match="no robomimic file"):
        RobomimicSource(str(tmp_path / "flat.hdf5")).arrays()
    (tmp_path / "broken.hdf5").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="truncated or not an HDF5 file"):
        RobomimicSource(str(tmp_path / "broken.hdf5")).arrays()
    images = RobomimicSource(str(write(tmp_path / "image.hdf5")), observation_keys=["camera_image"])
    with pytest.raises(UserError, match="images are not read"):
        images.spec()
    wrong = write(tmp_path / "mask.hdf5", train=["demo_1"], valid=["demo_99"])
    with pytest.raises(UserError, match="its filter keys name demo_99, which is not in the file"):
        RobomimicSource(str(wrong)).arrays()


def test_trains(tmp_path: Path) -> None:
    path = write(tmp_path / "low_dim.hdf5")
    overrides = ("experiment=custom", "data=robomimic", f"data.source.path={path}")
    summary = train(tiny_config(tmp_path, *overrides, "data.source.observation_keys=[gripper,eef]"), tmp_path / "run")
    assert summary["updates"] == 6
    assert summary["data"]["observation_keys"] == ["gripper", "eef"]
