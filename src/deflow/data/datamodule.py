"""OfflineDataModule: whole random batches straight from memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from deflow import distributed
from deflow.data.augment import maybe_crop
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.ranges import Count, Discount, Positive, Probability, Seed
from deflow.seeding import torch_generator
from deflow.types import Batch, Lookahead, stack

log = logging.getLogger(__name__)


class BatchStream(IterableDataset):
    """Batches drawn uniformly with replacement; batch number `i` depends on the seed, the rank and `i` alone.

    Args:
        transitions: the data.
        batch_size: of this rank.
        first: number of the first batch (that of a resumed stage is not 0).
        last: number after the last batch.
        seed_parts: seed and names that tell this stream's draws from all others.
        span: of each transition.
        proposals: if given, one cached proposal comes with every `s` and `s'`.
        crop_probability: of a batch of images, see `maybe_crop`.
    """

    def __init__(
        self,
        transitions: Transitions,
        batch_size: int,
        first: int,
        last: int,
        seed_parts: tuple[int | str, ...],
        span: Lookahead,
        proposals: ProposalCache | None = None,
        crop_probability: float = 0.0,
    ) -> None:
        self.span, self.crop_probability = span, crop_probability
        self.starts = transitions.chunk_starts(span.horizon)
        self.transitions, self.batch_size = transitions, batch_size
        self.first, self.last = first, last
        self.seed_parts, self.proposals = seed_parts, proposals

    def __len__(self) -> int:
        return self.last

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.first, self.last):
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the stream."""
        generator = torch_generator(torch.device("cpu"), *self.seed_parts, distributed.rank(), number)
        rows = self.starts[torch.randint(len(self.starts), (self.batch_size,), generator=generator)]
        batch, next_rows = self.transitions.batch(rows, self.span)
        batch = maybe_crop(batch, self.crop_probability, generator)
        if self.proposals is None:
            return batch
        return batch._replace(
            base_actions=self.proposals.draw(rows, generator),
            next_base_actions=self.proposals.draw(next_rows, generator),
        )


class SeedStream(IterableDataset):
    """The batches of several seeds' streams, stacked along a new first axis."""

    def __init__(self, streams: Sequence[BatchStream]) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams[0])

    def __iter__(self) -> Iterator[Batch]:
        for batches in zip(*self.streams, strict=True):
            yield stack(batches)


class PacedStream(IterableDataset):
    """A stream that calls `between` whenever, after its first, the next batch is asked for."""

    def __init__(self, stream: IterableDataset, between: Callable[[], None]) -> None:
        self._stream, self._between = stream, between

    def __len__(self) -> int:
        return len(cast(Sized, self._stream))

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            yield batch
            self._between()


class OnlineBatches(Protocol):
    """Batches that partly come from the environment, and so have a state; see `deflow.online`."""

    def start_at(self, first: int, batch_size: int) -> IterableDataset:
        """The stream from batch `first` on, `batch_size` transitions each."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OfflineDataModule(LightningDataModule):
    """Offline transitions in memory, sampled in whole batches without worker processes.

    A batch is made in 0.1 ms by `index_select`: workers would only add copies.

    Args:
        source: finds, downloads or generates the data and loads it.
        batch_size: transitions of one update over all ranks.
        validation_batches: batches of the validation split on which the losses are evaluated.
        seed: of the sampling.
        seeds: above 1, the batches of so many seeds from `seed` on are stacked, see `SeedStack`.
        n_step: steps of reward before the bootstrap; 1 is the papers' setting.
        discount: gamma.
        horizon: actions that the policy decides at once; above 1 the return spans as many steps.
        crop_probability: that a batch of images is randomly cropped in training; 0 for states.
        reward_scale: of the source's rewards, before anything is summed up; see `Units`.
        reward_shift: added to them after that.
    """

    def __init__(
        self,
        source: Source,
        batch_size: Count,
        validation_batches: Count,
        seed: Seed,
        discount: Discount,
        seeds: Count = 1,
        n_step: Count = 1,
        horizon: Count = 1,
        crop_probability: Probability = 0.0,
        reward_scale: Positive = 1.0,
        reward_shift: float = 0.0,
    ) -> None:
        super().__init__()
        if n_step > 1 and horizon > 1:
            raise UserError("a chunk's return already spans agent.horizon steps: leave data.n_step at 1")
        self.span = Lookahead(discount, max(n_step, horizon), horizon)
        self.crop_probability = crop_probability
        self.reward_scale, self.reward_shift = reward_scale, reward_shift
        self.source, self.batch_size = source, batch_size
        self.validation_batches = validation_batches
        self.seeds = range(seed, seed + seeds)
        self.transitions: Transitions | None = None
        self.validation: Transitions | None = None
        self._stage: str | None = None

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        if self.transitions is not None:
            return
        train, validation = self.source.load()
        self.transitions, self.validation = self._with_units(train), validation and self._with_units(validation)
        self._check_chunks()
        if self.crop_probability and self.transitions.states.ndim != 4:
            raise UserError("data.crop_probability is for images: leave it at 0 for states")
        if self.batch_size > len(self.transitions):
            raise UserError(
                f"data.batch_size={self.batch_size} is larger than the data ({len(self.transitions)} transitions)"
            )

    def _with_units(self, transitions: Transitions) -> Transitions:
        """The source's units, and those of the rewards."""
        return replace(transitions, units=transitions.units.with_rewards(self.reward_scale, self.reward_shift))

    def _check_chunks(self) -> None:
        """Validation trajectories may all be shorter than a chunk: then there is nothing to validate on."""
        if self.validation is None:
            return
        try:
            self.validation.chunk_starts(self.span.horizon)
        except UserError:
            log.warning("nothing is validated: agent.horizon=%d is longer than those trajectories", self.span.horizon)
            self.validation = None

    def add_returns(self) -> None:
        """Let batches hold `returns`."""
        assert self.transitions is not None
        self.transitions = self.transitions.with_returns(self.span.discount)
        if self.validation is not None:
            self.validation = self.validation.with_returns(self.span.discount)

    def begin_stage(
        self,
        name: str,
        steps: int,
        proposals: Sequence[ProposalCache] | None = None,
        online: OnlineBatches | None = None,
        between_updates: Callable[[], None] = lambda: None,
    ) -> None:
        """What the next `fit` draws; without it there is nothing to train on.

        Args:
            name: of the stage.
            steps: batches.
            proposals: each seed's, which come with the batches.
            online: gives the batches instead of the data.
            between_updates: called between any two batches.
        """
        self._stage, self._steps, self._proposals, self._online = name, steps, proposals, online
        self._between_updates = between_updates

    def state_dict(self) -> dict[str, Any]:
        """What an online stage needs to go on, of every rank; nothing else has a state."""
        return {} if self._online is None else {"online": distributed.gather_objects(self._online.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._online is not None:
            self._online.load_state_dict(state_dict["online"][distributed.rank()])

    def train_dataloader(self) -> DataLoader:
        assert self.transitions is not None
        if self._stage is None:
            raise UserError("no stage has begun: call begin_stage of the data module (and of the agent) before fit")
        first = self.trainer.global_step if self.trainer is not None else 0
        stream: IterableDataset
        if self._online is not None:
            stream = self._online.start_at(first, self._rank_batch_size())
        else:
            draw = self._steps, self._stage, self._proposals, self.crop_probability
            stream = self._stream(self.transitions, first, *draw)
        return DataLoader(PacedStream(stream, self._between_updates), batch_size=None)

    def sample_stream(self, steps: int) -> BatchStream | SeedStream:
        """A few batches of the data, for whoever wants to time an update."""
        assert self.transitions is not None
        return self._stream(self.transitions, 0, steps, "sample")

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Nothing, if the data have no validation split."""
        if self.validation is None:
            return []
        return DataLoader(self._stream(self.validation, 0, self.validation_batches, "validation"), batch_size=None)

    def _stream(
        self,
        transitions: Transitions,
        first: int,
        last: int,
        name: str,
        proposals: Sequence[ProposalCache] | None = None,
        crop_probability: float = 0.0,
    ) -> BatchStream | SeedStream:
        streams = [
            BatchStream(
                transitions,
                self._rank_batch_size(),
                first,
                last,
                seed_parts=(seed, name, "batch"),
                span=self.span,
                proposals=proposals[number] if proposals else None,
                crop_probability=crop_probability,
            )
            for number, seed in enumerate(self.seeds)
        ]
        return streams[0] if len(streams) == 1 else SeedStream(streams)

    def _rank_batch_size(self) -> int:
        ranks = distributed.world_size()
        if self.batch_size % ranks:
            raise UserError(f"data.batch_size={self.batch_size} does not divide by the {ranks} processes")
        return self.batch_size // ranks
