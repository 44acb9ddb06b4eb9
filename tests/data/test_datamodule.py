"""Sampling: reproducible from any point, different on every rank, with proposals that belong to their states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from deflow import distributed
from deflow.data.datamodule import OfflineDataModule
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.transitions import Transitions
from deflow.data.streams import BatchStream, Prefetched, SeedStream
from deflow.errors import UserError
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.seeding import torch_generator
from deflow.types import Lookahead, Spec, stack
from deflow.units import Units
from tests.conftest import compose_config

ONE_STEP = Lookahead(discount=0.9)


@pytest.fixture
def transitions() -> Transitions:
    rows = 101
    arrays = {
        "observations": np.arange(rows, dtype=np.float32)[:, None].repeat(2, 1),
        "actions": np.zeros((rows, 3)),
        "rewards": np.zeros(rows),
        "masks": np.ones(rows),
        "valids": np.append(np.ones(rows - 1), 0),
    }
    return Transitions.from_compact(arrays, "test")


def test_shapes_and_successors(transitions: Transitions) -> None:
    batch = BatchStream(transitions, 16, 0, 1, (0, "test"), ONE_STEP).batch(0)
    assert batch.observations.shape == batch.next_observations.shape == (16, 2)
    assert batch.rewards.shape == batch.discounts.shape == (16,)
    assert torch.equal(batch.next_observations, batch.observations + 1)


def test_n_step_returns_equal_the_sum_written_out() -> None:
    # Trajectories of 7 transitions, one of which ends its task in the middle.
    rng = np.random.default_rng(0)
    rows, length, discount = 40, 8, 0.9
    arrays = {
        "observations": np.arange(rows, dtype=np.float32)[:, None],
        "actions": np.zeros((rows, 1)),
        "rewards": rng.normal(size=rows),
        "masks": (np.arange(rows) != 11).astype(float),
        "valids": (np.arange(rows) % length != length - 1).astype(float),
    }
    data = Transitions.from_compact(arrays, "test")
    for n_step in (1, 2, 3, 20):
        batch, next_rows = data.batch(data.starts, Lookahead(discount, n_step))
        for i, start in enumerate(data.starts.tolist()):
            value, mask, row = 0.0, 1.0, start
            for k in range(n_step):
                value += discount**k * mask * arrays["rewards"][row]
                mask *= arrays["masks"][row]
                row += 1
                if mask == 0 or not arrays["valids"][row] or k == n_step - 1:
                    break
            bootstrap = mask * discount ** (k + 1)
            assert batch.rewards[i].item() == pytest.approx(value, abs=1e-5)
            assert batch.discounts[i].item() == pytest.approx(bootstrap, abs=1e-6)
            assert batch.next_observations[i].item() == row == next_rows[i]


def test_returns_end_with_the_task_and_go_on_where_a_trajectory_is_cut() -> None:
    # Rows 0 to 3 reach the goal at row 1 and go on, as OGBench's data do; rows 4 and 5 are cut.
    arrays = {
        "observations": np.zeros((6, 1)),
        "actions": np.zeros((6, 1)),
        "rewards": np.array([-1, 0, -2, 7, -3, 7]),
        "masks": np.array([1, 0, 1, 1, 1, 1]),
        "valids": np.array([1, 1, 1, 0, 1, 0]),
    }
    data = Transitions.from_compact(arrays, "test").with_returns(discount=0.5)
    batch, _ = data.batch(data.starts, ONE_STEP)
    assert batch.returns is not None
    assert batch.returns.tolist() == [-1.0, 0.0, -4.0, -6.0]


def test_returns_of_what_earned_rewards_are_what_the_data_hold(caplog: pytest.LogCaptureFixture) -> None:
    arrays = {
        "observations": np.zeros((6, 1)),
        "actions": np.zeros((6, 1)),
        "rewards": np.array([0, 1, 1, 0, -1, 0]),
        "masks": np.ones(6),
        "valids": np.array([1, 1, 1, 0, 1, 0]),
    }
    data = Transitions.from_compact(arrays, "test").with_returns(discount=0.5)
    assert data.returns is not None
    assert data.returns[data.starts].tolist() == [0.75, 1.5, 1.0, -2.0]  # the second costs -1 for ever
    assert "returns of trajectories that were cut count what the data hold" in caplog.text


def test_returns_are_computed_once_for_both_splits_of_the_same_columns(
    transitions: Transitions, caplog: pytest.LogCaptureFixture
) -> None:
    splits = tuple(replace(transitions, starts=starts) for starts in transitions.starts.split(50))
    source = type("Source", (), {"load": lambda self: splits})()
    data = OfflineDataModule(source, batch_size=8, validation_batches=1, seed=0, discount=0.9, reward_shift=2.0)
    data.setup()
    data.add_returns()
    assert data.transitions is not None
    assert data.validation is not None
    assert data.transitions.returns is not None
    assert data.validation.returns is data.transitions.returns
    assert caplog.text.count("returns of trajectories that were cut") == 1


@pytest.mark.parametrize("highest", [0.0, 1.0])
def test_returns_from_some_rows_are_those_of_all(highest: float, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    lengths = [1, 30, 2, 7, 100, 1, 12]
    arrays = {
        "observations": np.zeros((sum(lengths), 1)),
        "actions": np.zeros((sum(lengths), 1)),
        "rewards": highest - rng.integers(3, size=sum(lengths)),
        "masks": rng.random(sum(lengths)) > 0.05,
        "valids": np.concatenate([np.arange(length) < length - 1 for length in lengths]),
    }
    data = Transitions.from_compact(arrays, "test")
    rows = data.starts[torch.as_tensor(rng.permutation(len(data.starts))[:40])]
    found = data.returns_from(rows, 0.9)
    assert not caplog.records  # what is said of cut trajectories is said to those who learn from returns
    of_all = data.with_returns(0.9).returns
    assert of_all is not None
    assert torch.equal(found, of_all[rows])
    assert torch.equal(data.returns_from(rows[:1], 0.9), of_all[rows[:1]])


def test_chunks_stay_inside_their_trajectory() -> None:
    # Trajectories of 7 transitions in 8 rows; the task ends at row 11.
    rows, length, discount, horizon = 40, 8, 0.9, 3
    arrays = {
        "observations": np.arange(rows, dtype=np.float32)[:, None],
        "actions": np.stack([np.arange(rows), -np.arange(rows)], axis=1) / rows,
        "rewards": np.ones(rows),
        "masks": (np.arange(rows) != 11).astype(float),
        "valids": (np.arange(rows) % length != length - 1).astype(float),
    }
    data = Transitions.from_compact(arrays, "test")
    starts = data.chunk_starts(horizon)
    assert [start % length for start in starts.tolist()[:5]] == [0, 1, 2, 3, 4]
    assert len(starts) == 5 * 5
    batch, next_rows = data.batch(starts, Lookahead(discount, horizon, horizon))
    assert batch.actions.shape == (25, 6)
    for i, start in enumerate(starts.tolist()):
        expected = [x for row in range(start, start + horizon) for x in (row / rows, -row / rows)]
        assert batch.actions[i].tolist() == pytest.approx(expected)
        ends = [row for row in range(start, start + horizon) if row == 11]
        steps = ends[0] - start + 1 if ends else horizon
        last = start // length * length + length - 1  # of its trajectory
        after = [x for row in range(start + steps, start + steps + horizon) for x in (min(row, last), -min(row, last))]
        assert batch.next_actions[i].tolist() == pytest.approx([x / rows for x in after])
        assert batch.rewards[i].item() == pytest.approx(sum(discount**k for k in range(steps)))
        assert batch.discounts[i].item() == pytest.approx(0.0 if ends else discount**horizon)
        assert next_rows[i].item() == start + steps
    with pytest.raises(UserError, match="longer than every trajectory"):
        data.chunk_starts(8)


def test_a_stream_goes_on_where_it_was(transitions: Transitions) -> None:
    whole = list(BatchStream(transitions, 8, 0, 6, (0, "test"), ONE_STEP))
    rest = list(BatchStream(transitions, 8, 4, 6, (0, "test"), ONE_STEP))
    assert all(torch.equal(a.observations, b.observations) for a, b in zip(whole[4:], rest, strict=True))


def test_seeds_stages_and_ranks_sample_differently(transitions: Transitions, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [BatchStream(transitions, 32, 0, 1, parts, ONE_STEP).batch(0) for parts in ((0, "a"), (1, "a"), (0, "b"))]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    draws.append(BatchStream(transitions, 32, 0, 1, (0, "a"), ONE_STEP).batch(0))
    seen = {tuple(batch.observations[:, 0].tolist()) for batch in draws}
    assert len(seen) == 4


def test_every_transition_is_drawn_equally_often(transitions: Transitions) -> None:
    stream = BatchStream(transitions, 1000, 0, 40, (0, "test"), ONE_STEP)
    counts = torch.bincount(torch.cat([b.observations[:, 0].long() for b in stream]), minlength=100)
    assert counts.sum() == 40_000
    # 400 expected for each, standard deviation 20.
    assert (counts - 400).abs().max() < 100


def test_batch_larger_than_the_data(transitions: Transitions) -> None:
    source = type("Source", (), {"load": lambda self: (transitions, transitions)})()
    with pytest.raises(UserError, match="larger than the data"):
        OfflineDataModule(source, batch_size=1000, validation_batches=1, seed=0, discount=0.9).setup()


def test_a_chunk_has_no_steps_of_its_own() -> None:
    with pytest.raises(UserError, match=r"leave data.n_step at 1"):
        OfflineDataModule(None, batch_size=8, validation_batches=1, seed=0, discount=0.9, horizon=2, n_step=3)


@pytest.fixture
def flow() -> BehaviorFlow:
    torch.manual_seed(0)
    return BehaviorFlow(Spec(2, 3), hidden=(16,))


def test_proposals_are_those_of_the_flow(transitions: Transitions, flow: BehaviorFlow, tmp_path: Path) -> None:
    make = partial(ProposalCache.load_or_compute, flow, transitions, 4, 0, tmp_path / "proposals.npy")
    cache, again = make(), make()
    rows = torch.arange(50)
    drawn = [c.of(rows, c.draw(len(rows), torch.Generator().manual_seed(0))) for c in (cache, again)]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (50, 3)
    z = torch.randn(len(transitions.states) * 4, 3, generator=torch_generator(torch.device("cpu"), 0, "proposals", 0))
    solved = flow.propose(transitions.states.repeat_interleave(4, dim=0), z).reshape(-1, 4, 3)[:50]
    nearest = (solved - drawn[0][:, None]).abs().amax(-1).amin(-1)
    assert nearest.max() < 1e-3  # float16
    other_states = (solved[1:] - drawn[0][:-1, None]).abs().amax(-1).amin(-1)
    assert other_states.max() > 1e-2


def test_a_stale_cache_is_never_used(transitions: Transitions, flow: BehaviorFlow, tmp_path: Path) -> None:
    path = tmp_path / "proposals.npy"
    ProposalCache.load_or_compute(flow, transitions, 4, 0, path)
    first = path.read_bytes()
    with torch.no_grad():
        next(flow.parameters()).add_(0.1)
    ProposalCache.load_or_compute(flow, transitions, 4, 0, path)
    assert path.read_bytes() != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"nonsense"),
        lambda path: path.unlink(),
        lambda path: np.save(path, np.zeros((3, 4, 3), np.float16)),
    ],
)
def test_damaged_proposals_are_computed_anew(
    damage: Callable[[Path], object],
    transitions: Transitions,
    flow: BehaviorFlow,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "proposals.npy"
    make = partial(ProposalCache.load_or_compute, flow, transitions, 4, 0, path)
    make()
    whole = path.read_bytes()
    damage(path)
    make()
    assert path.read_bytes() == whole
    assert "proposals.npy is damaged: computing the proposals anew" in caplog.text


def test_a_damaged_key_is_no_key(transitions: Transitions, flow: BehaviorFlow, tmp_path: Path) -> None:
    path = tmp_path / "proposals.npy"
    make = partial(ProposalCache.load_or_compute, flow, transitions, 4, 0, path)
    make()
    key = path.with_suffix(".key").read_bytes()
    path.with_suffix(".key").write_bytes(b"\xff\xfe")
    make()
    assert path.with_suffix(".key").read_bytes() == key


def test_nothing_is_drawn_before_a_stage_begins(transitions: Transitions) -> None:
    data = OfflineDataModule(None, batch_size=8, validation_batches=1, seed=0, discount=0.9)
    data.transitions = transitions
    with pytest.raises(UserError, match="no stage has begun: call begin_stage"):
        data.train_dataloader()
    data.begin_stage("joint", steps=3)
    assert len(list(data.train_dataloader())) == 3


@pytest.fixture
def of_each_kind() -> list[tuple[Transitions, Lookahead, float]]:
    """Data of 60 rows, what a transition spans, and how many batches are cropped."""
    rng, rows = np.random.default_rng(0), 60
    columns = {"actions": np.zeros((rows, 2)), "rewards": rng.normal(size=rows), "masks": np.ones(rows)}
    valids = np.arange(1, rows + 1) % 20 != 0
    states = {"observations": rng.normal(size=(rows, 4)), **columns, "valids": valids}
    frames = {"observations": rng.integers(0, 256, (rows, 9, 9, 3), dtype=np.uint8), **columns, "valids": valids}
    return [
        (Transitions.from_compact(arrays, "test", frames=2).with_returns(0.9), span, cropped)
        for arrays, span, cropped in (
            (states, Lookahead(0.9, 3, path=True), 0.0),
            (states, Lookahead(0.9, 2, 2, path=True), 0.0),
            (frames, Lookahead(0.9, path=True), 1.0),
        )
    ]


def test_a_batch_is_put_together_where_the_data_lie(of_each_kind: list[tuple[Transitions, Lookahead, float]]) -> None:
    # On "meta" nothing is computed, but whatever is made elsewhere is refused, as on a GPU.
    elsewhere = torch.device("meta")
    for data, span, cropped in of_each_kind:
        proposals = ProposalCache(torch.zeros(60, 4, 2, dtype=torch.half))
        here = BatchStream(data, 8, 0, 1, (0, "test"), span, proposals, cropped)
        starts = data.chunk_starts(span.horizon)
        moved = BatchStream(data, 8, 0, 1, (0, "test"), span, proposals.to(elsewhere), cropped)
        moved.starts, moved.transitions = starts.to(elsewhere), data.on(elsewhere)
        for own, other in (here, moved), (SeedStream([here, here]), SeedStream([moved, moved])):
            for column, there in zip(own.batch(0), other.batch(0), strict=True):
                assert there.device == elsewhere
                assert (there.shape, there.dtype) == (column.shape, column.dtype)


@pytest.mark.parametrize("cached", [False, True])
def test_seeds_get_the_batches_that_each_would_get_alone(
    of_each_kind: list[tuple[Transitions, Lookahead, float]], cached: bool
) -> None:
    caches = [ProposalCache(torch.rand(60, 4, 2).half()) if cached else None for _ in range(3)]
    for data, span, cropped in of_each_kind:
        alone = [BatchStream(data, 8, 0, 3, (seed, "test"), span, cache, cropped) for seed, cache in enumerate(caches)]
        together = SeedStream(alone)
        for number in range(3):
            expected = stack([stream.batch(number) for stream in alone])
            for column, own in zip(together.batch(number), expected, strict=True):
                assert column is own is None or torch.equal(column, own)


def test_a_copy_is_in_the_networks_units() -> None:
    units = Units(low=(-2.0, -4.0), high=(2.0, 4.0), mean=(1.0, 2.0), std=(3.0, 0.5), reward=(0.5, -1.0))
    rng, rows = np.random.default_rng(0), 50
    columns = {"actions": rng.uniform(-4, 4, (rows, 2)), "rewards": rng.normal(size=rows), "masks": np.ones(rows)}
    arrays = {"observations": rng.normal(size=(rows, 2)), **columns, "valids": np.arange(rows) < rows - 1}
    data = replace(Transitions.from_compact(arrays, "test"), units=units).with_returns(0.9)
    copied = data.on(torch.device("cpu"))
    streams = [BatchStream(of, 32, 0, 1, (0, "test"), ONE_STEP) for of in (data, copied)]
    for own, other in zip(*(stream.batch(0) for stream in streams), strict=True):
        assert own is other or torch.equal(own, other)


def test_batches_made_ahead_are_the_streams(transitions: Transitions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # which needs a GPU's driver
    stream = BatchStream(transitions, 8, 3, 20, (0, "test"), ONE_STEP)
    ahead = list(Prefetched(stream, threads=2))
    assert len(ahead) == 17
    for own, other in zip(stream, ahead, strict=True):
        assert torch.equal(own.observations, other.observations)


def test_blocks_are_the_batches_and_end_at_multiples(transitions: Transitions) -> None:
    streams = [BatchStream(transitions, 8, 3, 18, (seed, "test"), ONE_STEP) for seed in range(2)]
    for stream in (streams[0], SeedStream(streams)):
        stream.at_once = 5
        blocks = list(stream)
        assert [len(block.choices) for block in blocks] == [2, 5, 5, 3]
        batches = [drawn.batch() for block in blocks for drawn in block.one_by_one()]
        for number, batch in enumerate(batches, start=3):
            assert torch.equal(batch.observations, stream.batch(number).observations)


@pytest.mark.parametrize(("there", "at_once", "pinned"), [("cuda", None, False), ("cuda", 5, True), ("cpu", 5, True)])
def test_what_is_on_the_gpu_is_not_pinned(
    there: str, at_once: int | None, pinned: bool, point_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = instantiate(compose_config("experiment=pointmaze", f"paths.data={point_data}", "data.batch_size=4").data)
    data.setup()
    monkeypatch.setattr(data, "_networks_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(data, "_beside_the_networks", lambda: (data.transitions, None))
    monkeypatch.setattr(BatchStream, "device", torch.device(there))
    data.begin_stage("test", 10, at_once=at_once)
    assert data.train_dataloader().pin_memory is pinned
