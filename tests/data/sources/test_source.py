"""Compact layout, the split, and data that are not OGBench's."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from deflow.data.sources.custom import CustomSource
from deflow.data.sources.d4rl import D4RLSource
from deflow.data.sources.shards import COLUMNS
from deflow.data.sources.source import compact, split
from deflow.errors import UserError
from deflow.pipeline import train
from tests.conftest import compose_config, tiny_config, write_d4rl

KEYS = {key: key for key in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")}


def own_columns(episodes: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    """State `10 e + t` in step `t` of episode `e`; the last episode ends its task, the others time out."""
    times = np.arange(length)
    observations = np.concatenate([10.0 * e + times for e in range(episodes)])[:, None].repeat(2, 1)
    ends = np.tile(times == length - 1, episodes)
    terminals = ends & (np.arange(len(ends)) == len(ends) - 1)
    return {
        "observations": observations,
        "next_observations": observations + 1,
        "actions": observations / 100,
        "rewards": observations[:, 0],
        "terminals": terminals,
        "timeouts": ends & ~terminals,
    }


def columns_of(source_columns: dict[str, np.ndarray]) -> list[np.ndarray]:
    names = ("observations", "actions", "rewards")
    return [source_columns[name] for name in names] + [1.0 - source_columns["terminals"]]


def test_compact_keeps_every_last_state() -> None:
    columns = own_columns()
    ends = columns["terminals"] | columns["timeouts"]
    arrays = compact(*columns_of(columns), ends, columns["next_observations"])
    rows = np.flatnonzero(arrays["valids"])
    assert len(rows) == 15
    assert np.array_equal(arrays["observations"][rows], columns["observations"])
    assert np.array_equal(arrays["observations"][rows + 1], columns["next_observations"])
    assert np.array_equal(arrays["masks"][rows], 1.0 - columns["terminals"])
    # What would have been done in a last state is not known: the action before it stands there.
    followers = np.append(columns["actions"][1:], columns["actions"][-1:], axis=0)
    assert np.array_equal(arrays["actions"][rows + 1], np.where(ends[:, None], columns["actions"], followers))


def test_compact_finds_ends_by_the_jump() -> None:
    columns = own_columns()
    nothing = np.zeros(15, bool)
    arrays = compact(*columns_of(columns), nothing, columns["next_observations"])
    assert list(np.flatnonzero(arrays["valids"] == 0)) == [5, 11, 17]


def test_compact_without_next_observations_drops_time_outs_and_keeps_terminals() -> None:
    columns = own_columns(episodes=2)
    terminals = np.zeros(10, bool)
    terminals[4] = True  # a true end: its successor does not matter, so the transition stays
    columns["terminals"] = terminals
    arrays = compact(*columns_of(columns), terminals)
    # The row after the true end stands in for the state in which it ended; no trajectory reaches into the next.
    assert list(np.flatnonzero(arrays["valids"] == 0)) == [5, 10]
    assert arrays["masks"][4] == 0
    assert arrays["observations"][6, 0] == columns["observations"][5, 0]


def test_data_with_terminals_alone_are_split(tmp_path: Path) -> None:
    columns = own_columns(episodes=20)
    ends = columns["terminals"] | columns["timeouts"]
    keys = {key: key for key in ("observations", "actions", "rewards", "terminals")}
    np.savez(tmp_path / "mine.npz", **{k: columns[k] for k in ("observations", "actions", "rewards")}, terminals=ends)
    train_part, validation = CustomSource(str(tmp_path / "mine.npz"), keys).load()
    assert (len(train_part), len(validation)) == (18 * 5, 2 * 5)


def test_split_takes_whole_trajectories() -> None:
    columns = own_columns(episodes=20)
    ends = columns["terminals"] | columns["timeouts"]
    train_part, validation = split(compact(*columns_of(columns), ends, columns["next_observations"]), seed=0)
    episodes = [
        set((part["observations"][part["valids"] == 1][:, 0] // 10).tolist()) for part in (train_part, validation)
    ]
    assert len(episodes[1]) == 2
    assert not episodes[0] & episodes[1]
    assert len(episodes[0] | episodes[1]) == 20
    assert train_part["valids"][-1] == validation["valids"][-1] == 0


def test_own_npz_and_hdf5_agree(tmp_path: Path) -> None:
    columns = own_columns()
    np.savez(tmp_path / "mine.npz", **columns)
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        for key, column in columns.items():
            file[f"robot/{key}"] = column
    one = CustomSource(str(tmp_path / "mine.npz"), KEYS).load()
    two = CustomSource(str(tmp_path / "mine.h5"), {key: f"robot/{key}" for key in KEYS}).load()
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)
    assert len(one[0]) + len(one[1]) == 15


def test_own_data_train_without_an_environment(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **own_columns(episodes=30))
    keys = [f"data.source.keys.{key}={key}" for key in ("timeouts", "next_observations")]
    config = tiny_config(tmp_path, "experiment=custom", f"data.source.path={tmp_path}/mine.npz", *keys)
    summary = train(config, tmp_path / "run")
    assert summary["evaluations"] == 0
    assert summary["protocol"] == "the user's own data"
    assert (tmp_path / "run" / "report.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": None}, "lacks observations"),
        ({"rewards": np.zeros(3)}, "different lengths"),
        ({"observations": np.zeros(15)}, "two axes"),
    ],
)
def test_own_data_that_do_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    columns = {key: column for key, column in (own_columns() | change).items() if column is not None}
    np.savez(tmp_path / "mine.npz", **columns)
    with pytest.raises(UserError, match=message):
        CustomSource(str(tmp_path / "mine.npz"), KEYS).load()


def test_own_data_without_ends_are_refused(tmp_path: Path) -> None:
    columns = own_columns() | {"terminals": np.zeros(15, bool)}
    np.savez(tmp_path / "mine.npz", **columns)
    keys = KEYS | {"timeouts": None, "next_observations": None}
    with pytest.raises(UserError, match="nothing says where trajectories end"):
        CustomSource(str(tmp_path / "mine.npz"), keys).load()


@pytest.mark.parametrize(("name", "kind"), [("a.npz", ".npz"), ("a.hdf5", "HDF5")])
def test_a_file_of_the_wrong_kind_is_named_as_such(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("not data")
    with pytest.raises(UserError, match=f"not an {kind} file"):
        CustomSource(str(tmp_path / name), KEYS).load()


def test_d4rl_antmaze(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "antmaze")
    source = D4RLSource("antmaze-umaze-v2", str(path), "", None)
    for part in source.load():
        assert set(part.rewards.tolist()) == {-1.0, 0.0}
        assert torch.equal(part.masks == 0, part.rewards == 0)
    train_part, validation = source.arrays()
    # A terminal (the goal) does not end a trajectory there: 4 trajectories of 40 rows, of which 3 and 1.
    ends = [np.flatnonzero((arrays["valids"] == 0) | (arrays["masks"] == 0)) for arrays in (train_part, validation)]
    assert len(train_part["valids"]) + len(validation["valids"]) == 160
    assert 119 in ends[0]
    assert 39 in ends[1]


def test_d4rl_of_another_family_is_refused(tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / "file.hdf5", "pen")
    with pytest.raises(UserError, match="another environment than door-human-v1"):
        D4RLSource("door-human-v1", str(path), "", None).arrays()
    with pytest.raises(UserError, match="unknown D4RL data set"):
        D4RLSource("kitchen-mixed-v0", str(path), "", None)
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


@pytest.mark.parametrize(("maze", "goal"), [("umaze", (0, 8)), ("medium-play", (20, 20)), ("large-diverse", (32, 24))])
def test_d4rl_mazes_have_d4rls_coordinates(maze: str, goal: tuple[float, float]) -> None:
    # Cells are 4 apart and the start cell is the origin; both starts and goals are drawn within a quarter cell.
    env = D4RLSource(f"antmaze-{maze}-v2", None, "", None).make_env()
    observation, _ = env.reset(seed=0)
    assert observation.shape == (29,)
    assert np.abs(observation[:2]).max() <= 1.01
    assert np.abs(env.unwrapped.goal - env._origin - goal).max() <= 1.01
    env.close()


def test_d4rl_scores() -> None:
    assert D4RLSource("antmaze-umaze-v2", None, "", None).score(1.0) == 100
    assert D4RLSource("pen-human-v1", None, "", None).score(96.262799) == pytest.approx(0)


def test_hdf5_is_a_choice_of_its_own() -> None:
    config = compose_config("experiment=custom", "data=hdf5", "data.source.path=mine.h5")
    assert instantiate(config.data).source.name == "mine"
