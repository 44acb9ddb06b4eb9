"""The ring of old and new transitions: what is drawn how often, what is dropped, what a file gives back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deflow.data.memory.replay import Replay
from deflow.data.memory.transitions import Transitions
from deflow.errors import UserError
from deflow.types import Batch, Lookahead, Spec

SPEC = Spec(1, 1)
ONE_STEP = Lookahead(discount=0.9)
ROWS = 40  # transitions of the data


@pytest.fixture
def data() -> Transitions:
    """Observation i at row i."""
    arrays = {
        "observations": np.arange(ROWS + 1, dtype=np.float32)[:, None],
        "actions": np.zeros((ROWS + 1, 1)),
        "rewards": np.zeros(ROWS + 1),
        "masks": np.ones(ROWS + 1),
        "valids": np.append(np.ones(ROWS), 0),
    }
    return Transitions.from_compact(arrays, "test")


def new(first: int, count: int) -> Batch:
    """New transitions with observations 1000 + number."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    states = (1000 + numbers)[:, None]
    return Batch(states, torch.zeros(count, 1), numbers, torch.zeros(count), states + 0.5, -states)


def counts(replay: Replay, online_share: float | None = None, draws: int = 60_000) -> dict[int, int]:
    batch = replay.sample(draws, online_share, torch.Generator().manual_seed(0), ONE_STEP)
    values, numbers = batch.observations[:, 0].unique(return_counts=True)
    return {int(value): int(number) for value, number in zip(values, numbers, strict=True)}


def test_uniform_over_old_and_new(data: Transitions, tmp_path: Path) -> None:
    replay = Replay(data, data.starts, SPEC, steps=20, path=tmp_path / "new.bin")
    for i in range(20):
        replay.add(new(i, 1))
    drawn = counts(replay)
    assert set(drawn) == {*range(ROWS), *range(1000, 1020)}
    # 1000 expected for each, standard deviation 31.
    assert all(abs(number - 1000) < 160 for number in drawn.values())


@pytest.mark.parametrize(("share", "expected"), [(0.5, 30_000), (1.0, 60_000), (0.0, 0)])
def test_a_share_of_new_ones(share: float, expected: int, data: Transitions, tmp_path: Path) -> None:
    replay = Replay(data, data.starts, SPEC, steps=20, path=tmp_path / "new.bin")
    assert max(counts(replay, share)) < 1000  # nothing new yet
    replay.add(new(0, 5))
    drawn = counts(replay, share)
    assert sum(number for value, number in drawn.items() if value >= 1000) == expected


def test_the_ring_drops_the_oldest(data: Transitions, tmp_path: Path) -> None:
    replay = Replay(data, data.starts, SPEC, steps=200, path=tmp_path / "new.bin", capacity=50)
    replay.add(new(0, 10))
    assert set(counts(replay)) == {*range(ROWS), *range(1000, 1010)}
    replay.add(new(10, 15))  # 15 beyond the capacity: the first 15 of the data go
    assert set(counts(replay)) == {*range(15, ROWS), *range(1000, 1025)}
    replay.add(new(25, 100))  # now the first of the new go too
    assert (replay.kept_data, replay.kept_new) == (0, 50)
    assert set(counts(replay)) == set(range(1075, 1125))
    assert set(counts(replay, 0.5)) == set(range(1075, 1125))


def test_default_capacity(data: Transitions, tmp_path: Path) -> None:
    assert Replay(data, data.starts, SPEC, steps=1, path=tmp_path / "new.bin").capacity == 2_000_000


def test_columns_belong_together(data: Transitions, tmp_path: Path) -> None:
    replay = Replay(data, data.starts, SPEC, steps=20, path=tmp_path / "new.bin")
    replay.add(new(0, 20))
    batch = replay.sample(500, None, torch.Generator().manual_seed(0), ONE_STEP)
    is_new = batch.observations[:, 0] >= 1000
    assert torch.equal(batch.rewards[is_new], batch.observations[is_new, 0] - 1000)
    assert torch.equal(batch.next_observations[is_new], batch.observations[is_new] + 0.5)
    assert torch.equal(batch.next_observations[~is_new], batch.observations[~is_new] + 1)
    assert not batch.discounts[is_new].any()
    assert batch.discounts[~is_new].all()


@pytest.mark.parametrize("capacity", [None, 50, 7])
def test_the_file_gives_back_the_ring_of_a_checkpoint(capacity: int | None, data: Transitions, tmp_path: Path) -> None:
    settings = {"steps": 200, "capacity": capacity}
    whole = Replay(data, data.starts, SPEC, path=tmp_path / "whole.bin", **settings)
    killed = Replay(data, data.starts, SPEC, path=tmp_path / "killed.bin", **settings)
    for replay in (whole, killed):
        replay.add(new(0, 30))
    killed.add(new(500, 9))  # after the checkpoint, and half a row
    killed._file.write(b"abc")
    killed.flush()
    resumed = Replay(data, data.starts, SPEC, path=tmp_path / "killed.bin", added=30, **settings)
    for replay in (whole, resumed):
        replay.add(new(30, 5))
        replay.flush()
    batches = [replay.sample(300, None, torch.Generator().manual_seed(1), ONE_STEP) for replay in (whole, resumed)]
    assert torch.equal(batches[0].observations, batches[1].observations)
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "killed.bin").read_bytes()


def test_a_file_that_is_too_short_is_refused(data: Transitions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks transitions"):
        Replay(data, data.starts, SPEC, steps=10, path=tmp_path / "none.bin", added=3)
    with pytest.raises(UserError, match="at least 1"):
        Replay(data, data.starts, SPEC, steps=10, path=tmp_path / "none.bin", capacity=0)
