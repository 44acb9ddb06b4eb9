"""OfflineDataModule: whole random batches straight from memory."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, Protocol, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from deflow import distributed
from deflow.cores import usable_cores
from deflow.data.augment import crop, draw_shifts
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.ranges import Count, Discount, Positive, Probability, Seed
from deflow.seeding import torch_generator
from deflow.types import Batch, Block, Lookahead, stack
from deflow.units import scale_and_shift

log = logging.getLogger(__name__)

MEBI = 2**20
MOST_THREADS = 8  # that make batches ahead
DATA_SHARE = 0.5  # of a GPU's free memory that the data may take; networks, gradients and frames need the rest


class Stream(IterableDataset, ABC):
    """Batches that depend on their numbers alone: what is random is drawn on the CPU, and the rest done with the data.

    It gives batches, or blocks of them for whoever puts a batch together as a part of the update.

    Args:
        first: number of the first batch (that of a resumed stage is not 0).
        last: number after the last batch.
    """

    at_once: int | None = None  # batches of a block, but for the last, or the first that goes on in the midst of one

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the data lie."""

    @abstractmethod
    def draw(self, number: int) -> Tensor:
        """What is random about batch `number`, int64 on the CPU."""

    @abstractmethod
    def gather(self, choices: Tensor) -> Batch:
        """The batch of what was drawn, which must be where the data are."""

    def __len__(self) -> int:
        return self.last

    def __iter__(self) -> Iterator[Batch | Block]:
        if self.at_once is None:
            yield from (self.batch(number) for number in range(self.first, self.last))
            return
        start = self.first
        while start < self.last:
            stop = min(self.last, (start // self.at_once + 1) * self.at_once)
            yield Block(torch.stack([self.draw(number) for number in range(start, stop)]), self.gather)
            start = stop

    def batch(self, number: int) -> Batch:
        """Batch `number` of the stream."""
        return self.gather(self.draw(number).to(self.device))


class BatchStream(Stream):
    """Batches drawn uniformly with replacement; batch number `i` depends on the seed, the rank and `i` alone.

    Args:
        transitions: the data.
        batch_size: of this rank.
        first: number of the first batch (that of a resumed stage is not 0).
        last: number after the last batch.
        seed_parts: seed and names that tell this stream's draws from all others.
        span: of each transition.
        proposals: if given, one cached proposal comes with every `s` and `s'`.
        crop_probability: of a batch of images, see `draw_shifts`.
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
        super().__init__(first, last)
        self.span, self.crop_probability = span, crop_probability
        self.starts = transitions.chunk_starts(span.horizon)
        self.transitions, self.batch_size = transitions, batch_size
        self.seed_parts, self.proposals = seed_parts, proposals

    @property
    def device(self) -> torch.device:
        return self.transitions.device

    def draw(self, number: int) -> Tensor:
        """Shape (choices, batch)."""
        generator = torch_generator(torch.device("cpu"), *self.seed_parts, distributed.rank(), number)
        choices = [torch.randint(len(self.starts), (1, self.batch_size), generator=generator)]
        if self.crop_probability:
            choices.append(draw_shifts(self.batch_size, self.crop_probability, generator))
        if self.proposals is not None:
            choices += [self.proposals.draw(self.batch_size, generator)[None] for _ in range(2)]
        return torch.cat(choices)

    def gather(self, choices: Tensor) -> Batch:
        rows = self.starts.index_select(0, choices[0])
        batch, next_rows = self.transitions.batch(rows, self.span)
        if self.crop_probability:
            batch = crop(batch, choices[1:3])
        if self.proposals is None:
            return batch
        return batch._replace(
            base_actions=self.proposals.of(rows, choices[-2]),
            next_base_actions=self.proposals.of(next_rows, choices[-1]),
        )


class SeedStream(Stream):
    """The batches of several seeds' streams, stacked along a new first axis."""

    def __init__(self, streams: Sequence[BatchStream]) -> None:
        super().__init__(streams[0].first, streams[0].last)
        self.streams = streams

    @property
    def device(self) -> torch.device:
        return self.streams[0].device

    def draw(self, number: int) -> Tensor:
        """Shape (seeds, choices, batch)."""
        return torch.stack([stream.draw(number) for stream in self.streams])

    def gather(self, choices: Tensor) -> Batch:
        return stack([stream.gather(of_one) for stream, of_one in zip(self.streams, choices, strict=True)])


class Prefetched(IterableDataset):
    """A stream's batches, made ahead by threads, in memory from which a GPU copies without the host."""

    def __init__(self, stream: Stream, threads: int) -> None:
        self._stream, self._threads = stream, threads

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[Batch]:
        numbers = iter(range(self._stream.first, self._stream.last))
        with ThreadPoolExecutor(self._threads) as pool:
            ahead = deque(pool.submit(self._pinned, number) for number in islice(numbers, 2 * self._threads))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self._pinned, number) for number in islice(numbers, 1))
                yield batch

    def _pinned(self, number: int) -> Batch:
        columns = self._stream.batch(number)
        return Batch._make(None if column is None else column.pin_memory() for column in columns)


class PacedStream(IterableDataset):
    """A stream that calls `between` whenever, after its first, the next batch is asked for."""

    def __init__(self, stream: IterableDataset, between: Callable[[], None]) -> None:
        self._stream, self._between = stream, between

    def __len__(self) -> int:
        return len(cast(Sized, self._stream))

    def __iter__(self) -> Iterator[Batch | Block]:
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
        reward_scale: of the source's rewards, before anything is summed up; `auto`: see `scale_and_shift`.
        reward_shift: added to them after that.
        device: where the data lie: `auto` with the networks, if they fit there; `cpu` in this machine's memory.
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
        reward_scale: Positive | Literal["auto"] = 1.0,
        reward_shift: float = 0.0,
        device: Literal["auto", "cpu"] = "auto",
    ) -> None:
        super().__init__()
        if n_step > 1 and horizon > 1:
            raise UserError("a chunk's return already spans agent.horizon steps: leave data.n_step at 1")
        self.span = Lookahead(discount, max(n_step, horizon), horizon)
        self.crop_probability = crop_probability
        self.reward_scale: float | Literal["auto"] = reward_scale
        self.reward_shift = reward_shift
        self.source, self.batch_size = source, batch_size
        self.validation_batches = validation_batches
        self.seeds = range(seed, seed + seeds)
        self.transitions: Transitions | None = None
        self.validation: Transitions | None = None
        self._stage: str | None = None
        self._device: Literal["auto", "cpu"] = device
        self._resident: Transitions | None = None  # on a GPU

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        if self.transitions is not None:
            return
        train, validation = self.source.load()
        rewards = train.rewards[train.has_successor].numpy()
        units = train.units.with_rewards(*scale_and_shift(self.reward_scale, self.reward_shift, rewards))
        self.transitions, self.validation = replace(train, units=units), validation and replace(validation, units=units)
        self._check_chunks()
        if self.crop_probability and self.transitions.states.ndim != 4:
            raise UserError("data.crop_probability is for images: leave it at 0 for states")
        if self.batch_size > len(self.transitions):
            raise UserError(
                f"data.batch_size={self.batch_size} is larger than the data ({len(self.transitions)} transitions)"
            )

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

    def add_path(self) -> None:
        """Let batches hold the `path` of their states."""
        self.span = self.span._replace(path=True)

    def begin_stage(
        self,
        name: str,
        steps: int,
        proposals: Sequence[ProposalCache] | None = None,
        online: OnlineBatches | None = None,
        between_updates: Callable[[], None] = lambda: None,
        at_once: int | None = None,
    ) -> None:
        """What the next `fit` draws; without it there is nothing to train on.

        Args:
            name: of the stage.
            steps: batches.
            proposals: each seed's, which come with the batches.
            online: gives the batches instead of the data.
            between_updates: called between any two batches, or blocks of them.
            at_once: batches of a block, see `Stream`; data that do not lie with the networks come in batches.
        """
        self._at_once = at_once
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
        device = self._networks_device()
        stream: Any
        pinned = device.type == "cuda"  # what crosses to it: batches, or the choices of a block
        if self._online is not None:
            self._resident = None
            stream = self._online.start_at(first, self._rank_batch_size())
        else:
            transitions, proposals = self._beside_the_networks()
            stream = self._stream(transitions, first, self._steps, self._stage, proposals, self.crop_probability)
            if stream.device.type == device.type:
                stream.at_once = self._at_once
                pinned = pinned and stream.at_once is not None
            elif device.type == "cuda":
                stream = Prefetched(stream, min(MOST_THREADS, usable_cores()))
        paced = PacedStream(stream, self._between_updates)
        return DataLoader(paced, batch_size=None, pin_memory=pinned)

    def _networks_device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _beside_the_networks(self) -> tuple[Transitions, Sequence[ProposalCache] | None]:
        """The data and the stage's proposals on the device of the networks, or where they are if they do not fit there.

        There are the same batches either way.
        """
        assert self.transitions is not None
        device, caches = self._networks_device(), self._proposals or ()
        if self._device == "cpu" or device.type != "cuda":
            return self.transitions, self._proposals
        torch.cuda.empty_cache()  # what the stage before has left
        free, total = torch.cuda.mem_get_info(device)
        data, proposals = self.transitions.nbytes, sum(cache.nbytes for cache in caches)
        taken = "data %.0f MiB, proposals %.0f MiB, %s %.0f MiB", data / MEBI, proposals / MEBI, device, total / MEBI
        if (0 if self._resident else data) + proposals > DATA_SHARE * free:
            log.info(f"{taken[0]}: too much, every batch comes from this machine's memory", *taken[1:])
            self._resident = None
            return self.transitions, self._proposals
        if self._resident is None:
            self._resident = self.transitions.on(device)
        log.info(f"{taken[0]}: all there", *taken[1:])
        return self._resident, [cache.to(device) for cache in caches] or None

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
