"""D4RL's HDF5 files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from deflow.data.sources.d4rl import D4RLSource
from deflow.errors import UserError
from deflow.units import AS_THEY_ARE
from tests.conftest import compose_config, write_d4rl


def test_antmaze_is_labelled_as_in_the_papers(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "antmaze")
    source = D4RLSource("antmaze-umaze-v2", str(path), "", None)
    loaded, _ = source.load()
    with h5py.File(path) as file:
        assert np.array_equal(loaded.rewards, file["rewards"][:] - 1)  # tests/envs: and so is what is played
        assert np.array_equal(loaded.masks, 1 - file["terminals"][:])
    # A terminal (the goal) does not end a trajectory there; time-outs do, and drop the row that has no successor.
    assert list(np.flatnonzero(source.arrays()[0]["valids"] == 0)) == [39, 79, 119, 159]


def test_adroits_terminals_end_trajectories(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "pen")
    with h5py.File(path, "r+") as file:
        file["terminals"][:] = np.arange(160) == 19
        rewards = file["rewards"][:]
    train_part, _ = D4RLSource("pen-human-v1", str(path), "", None).arrays()
    # The terminal's transition stays, and a row more is the state in which it ended.
    assert list(np.flatnonzero(train_part["valids"] == 0)) == [20, 40, 80, 120, 160]
    assert list(np.flatnonzero((train_part["masks"] == 0) & (train_part["valids"] == 1))) == [19]
    assert np.array_equal(np.delete(train_part["rewards"], 20), rewards)
    assert D4RLSource("pen-human-v1", None, "", None).label(-5.0) == -5.0  # what is played is not shifted either


def test_all_is_trained_on_and_a_tenth_of_it_validated_on_whatever_the_runs_seed(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "antmaze", episodes=20)
    source = D4RLSource("antmaze-umaze-v2", str(path), "", None)
    train_part, validation = source.load()
    assert [len(part.first_rows[part.starts].unique()) for part in (train_part, validation)] == [20, 2]
    assert set(validation.starts.tolist()) < set(train_part.starts.tolist())
    assert validation.states is train_part.states
    assert "trained on all data" in source.protocol()["protocol"]
    assert compose_config("task=antmaze-umaze-v2", "seed=7").data.source.seed == 0


def test_standardised_observations_and_the_environments_are_one(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "pen")
    plain, _ = D4RLSource("pen-human-v1", str(path), "", None).load()
    train_part, validation = D4RLSource("pen-human-v1", str(path), "", None, standardise=True).load()
    states = train_part.states[train_part.starts]
    seen = train_part.observations(train_part.starts)
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(0), 1, rtol=1e-4)
    assert np.array_equal(train_part.units.observed(states.numpy()), seen)
    assert validation is not None
    assert validation.units == train_part.units
    assert plain.units == AS_THEY_ARE


def test_d4rl_of_another_family_is_refused(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "pen")
    with pytest.raises(UserError, match="another environment than door-human-v1"):
        D4RLSource("door-human-v1", str(path), "", None).arrays()
    with pytest.raises(UserError, match="unknown D4RL data set"):
        D4RLSource("kitchen-mixed-v0", str(path), "", None)
    with pytest.raises(UserError, match="the mazes are umaze, medium and large"):
        D4RLSource("antmaze-ultra-play-v2", str(path), "", None)
    with pytest.raises(UserError, match=r"set data.source.path to pen-human-v1's \.hdf5"):
        D4RLSource("pen-human-v1", None, str(tmp_path), None).prepare()


def test_a_downloaded_d4rl_file_of_no_use_is_fetched_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(url: str, path: Path, is_sound: object) -> None:
        urls.append(url)
        write_d4rl(path, "pen" if len(urls) == 1 else "door")

    monkeypatch.setattr("deflow.data.sources.d4rl.download", fetch)
    urls: list[str] = []
    path = tmp_path / "pen-human-v1.hdf5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n, and then nothing")
    source = D4RLSource("pen-human-v1", None, str(tmp_path), "http://somewhere/file")
    assert source.arrays()[0]["observations"].shape[1] == 45
    assert urls == ["http://somewhere/file"]
    assert "renamed to pen-human-v1.hdf5.damaged" in caplog.text
    path.write_bytes(b"nonsense again")
    with pytest.raises(UserError, match="another environment"):
        source.arrays()
    own = path.with_name("own.hdf5")
    own.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="truncated or not an HDF5 file"):  # the user's own stays where it is
        D4RLSource("pen-human-v1", str(own), "", "http://somewhere/file").arrays()
    assert len(urls) == 2


def test_d4rl_scores() -> None:
    assert D4RLSource("antmaze-umaze-v2", None, "", None).score(1.0) == 100
    assert D4RLSource("pen-human-v1", None, "", None).score(96.262799) == pytest.approx(0)
