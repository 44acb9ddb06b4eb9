"""Compact layout, the split, and data that are not OGBench's."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.custom import CustomSource
from deflow.data.sources.shards import COLUMNS
from deflow.data.sources.source import compact, split
from deflow.errors import UserError
from deflow.pipeline import train
from tests.conftest import compose_config, tiny_config

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
    arrays = compact(*columns_of(columns), ends, columns["next_observations"])
    parts = split(Transitions.from_compact(arrays, "test"), seed=0, origin="test")
    episodes = [set((part.states[part.starts][:, 0] // 10).tolist()) for part in parts]
    assert len(episodes[1]) == 2
    assert not episodes[0] & episodes[1]
    assert len(episodes[0] | episodes[1]) == 20
    assert [len(part) for part in parts] == [18 * 5, 2 * 5]


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


def test_own_data_without_rewards_are_for_imitation(tmp_path: Path) -> None:
    columns = own_columns()
    del columns["rewards"]
    np.savez(tmp_path / "mine.npz", **columns)
    with pytest.raises(UserError, match=r"lacks rewards; .* to imitate without rewards: data.source.keys.rewards=null"):
        CustomSource(str(tmp_path / "mine.npz"), KEYS).load()
    train_set, _ = CustomSource(str(tmp_path / "mine.npz"), KEYS | {"rewards": None}).load()
    assert not train_set.rewards.any()
    with pytest.raises(UserError, match=r"data.source.keys must name actions"):
        CustomSource(str(tmp_path / "mine.npz"), KEYS | {"actions": None}).load()


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


def test_hdf5_is_a_choice_of_its_own() -> None:
    config = compose_config("experiment=custom", "data=hdf5", "data.source.path=mine.h5")
    assert instantiate(config.data).source.name == "mine"
