"""A folder of shards: the same transitions as its files one after the other, and a replaced shard is noticed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.custom import CustomSource
from deflow.data.sources.shards import COLUMNS
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.types import Lookahead
from tests.conftest import tiny_config, write_tiny_data

ONE_STEP = Lookahead(discount=0.9)

NAME = "pointmaze-medium-navigate-v0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of the same length with different actions."""
    write_tiny_data("pointmaze-medium", "navigate", tmp_path)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        for suffix in ("", "-val"):
            arrays = dict(np.load(tmp_path / f"{NAME}{suffix}.npz"))
            arrays["actions"] = (arrays["actions"] * (0.5 + 0.1 * number)).astype(np.float32)
            np.savez_compressed(shards / f"{NAME}-00{number}{suffix}.npz", **arrays)
    return shards


def load(path: Path) -> Transitions:
    config = tiny_config(path, "experiment=pointmaze", "data.source.download=false", f"data.source.path={path}")
    source = instantiate(config.data.source)
    source.prepare()
    return source.load()[0]


def test_equal_to_the_files_one_after_the_other(folder: Path) -> None:
    mapped = load(folder)
    parts = [load(folder / f"{NAME}-00{number}.npz") for number in range(3)]
    assert len(mapped) == sum(len(part) for part in parts)
    transitions, _ = mapped.batch(mapped.starts, ONE_STEP)
    expected = [part.batch(part.starts, ONE_STEP)[0] for part in parts]
    for field in ("observations", "actions", "rewards", "discounts", "next_observations", "next_actions"):
        assert torch.equal(getattr(transitions, field), torch.cat([getattr(e, field) for e in expected])), field


def test_unpacked_once_and_a_replaced_shard_is_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load(folder)
    made = next(folder.rglob("states.bin")).stat().st_mtime_ns
    load(folder)
    assert next(folder.rglob("states.bin")).stat().st_mtime_ns == made
    (folder / f"{NAME}-002.npz").write_bytes((folder / f"{NAME}-000.npz").read_bytes())
    with caplog.at_level(logging.WARNING):
        after = load(folder)
    assert f"unpacked ({NAME}-002.npz)" in caplog.text
    assert torch.equal(after.actions[-160:], after.actions[:160])
    assert not torch.equal(before.actions[-160:], after.actions[:160])


def test_unpacking_that_was_killed_is_done_again(folder: Path) -> None:
    whole = load(folder).actions.clone()
    next(folder.rglob("index.json")).unlink()
    next(folder.rglob("actions.bin")).write_bytes(b"half")
    assert torch.equal(load(folder).actions, whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next(folder.rglob("actions.bin")).unlink(),
        lambda folder: next(folder.rglob("actions.bin")).write_bytes(b"half"),
        lambda folder: next(folder.rglob("index.json")).write_bytes(b"\xff\xfe"),
        lambda folder: next(folder.rglob("index.json")).write_text("[1]"),
        lambda folder: change_index(folder, lambda index: index.pop("columns")),
        lambda folder: change_index(folder, lambda index: index["columns"].update(masks=["|O", [480]])),
    ],
)
def test_damaged_columns_are_made_anew(
    damage: Callable[[Path], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(folder).actions.clone()
    damage(folder)
    assert torch.equal(load(folder).actions, whole)
    assert "are damaged: unpacking anew" in caplog.text


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    path = next(folder.rglob("index.json"))
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_broken_shard_is_named(folder: Path) -> None:
    (folder / f"{NAME}-001.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=f"{NAME}-001.npz"):
        load(folder)


@pytest.mark.usefixtures("short_episodes")
def test_a_run_on_shards(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, "experiment=pointmaze", "stages=staged", f"data.source.path={folder}")
    summary = train(config, tmp_path / "run")
    assert summary["data"]["path"] == str(folder)
    assert summary["evaluations"] >= 1


def test_columns_that_an_older_version_made_are_made_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load(folder).actions.clone()
    change_index(folder, lambda index: index.pop("settings"))
    column = next(folder.rglob("actions.bin"))
    column.write_bytes(bytes(column.stat().st_size))
    assert torch.equal(load(folder).actions, whole)
    assert "unpacked with other settings" in caplog.text


def test_another_column_of_ones_own_is_noticed(tmp_path: Path) -> None:
    keys = {"observations": "o", "actions": "a", "rewards": "r", "terminals": "t"}
    rows = {"o": np.random.default_rng(0).normal(size=(20, 2)), "a": np.zeros((20, 2)), "t": np.arange(20) % 5 == 4}
    np.savez(tmp_path / "mine.npz", **rows, r=np.ones(20), other=np.full(20, 7.0))
    for column, reward in (("r", 1.0), ("other", 7.0)):
        train_part, _ = CustomSource(str(tmp_path), keys | {"rewards": column}).load()
        assert train_part.rewards.max() == reward


def test_what_tasks_share_is_on_disk_once(folder: Path) -> None:
    transitions = {}
    for task_id in (1, 2):
        overrides = ("data.source.download=false", f"data.source.path={folder}", f"task_id={task_id}")
        source = instantiate(tiny_config(folder, "experiment=pointmaze", *overrides).data.source)
        transitions[source.task] = source.load()[0]
    tasks = [folder / "unpacked" / task for task in transitions]
    shared = {name: len({(task / f"{name}.bin").stat().st_ino for task in tasks}) == 1 for name in COLUMNS}
    assert shared == {"states": True, "actions": True, "rewards": False, "masks": False, "starts": True}
    one, other = transitions.values()
    assert torch.equal(one.states, other.states)
    assert torch.equal(one.starts, other.starts)
