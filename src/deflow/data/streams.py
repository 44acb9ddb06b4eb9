"""Streams: the batches of a stage, each of which follows from its number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from deflow import distributed
from deflow.data.augment import crop, draw_shifts
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.transitions import Transitions
from deflow.seeding import torch_generator
from deflow.types import Batch, Block, Lookahead


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
        choices = self.draw(number)
        if self.device.type == "cuda":  # or the host would wait for the copy
            choices = choices.pin_memory()
        return self.gather(choices.to(self.device, non_blocking=True))


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
        batch, rows, next_rows = self.of_data(choices)
        if self.proposals is None:
            return batch
        return batch._replace(
            base_actions=self.proposals.of(rows, choices[-2]),
            next_base_actions=self.proposals.of(next_rows, choices[-1]),
        )

    def of_data(self, choices: Tensor) -> tuple[Batch, Tensor, Tensor]:
        """The batch without proposals, and the rows of its states and of its next states."""
        rows = self.starts.index_select(0, choices[0])
        batch, next_rows = self.transitions.batch(rows, self.span)
        if self.crop_probability:
            batch = crop(batch, choices[1:3])
        return batch, rows, next_rows


class SeedStream(Stream):
    """The batches of several seeds' streams of the same data, stacked along a new first axis."""

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
        # One batch of all seeds' rows: a GPU takes as long for it as for that of one seed.
        seeds, _, size = choices.shape
        batch, rows, next_rows = self.streams[0].of_data(choices.transpose(0, 1).flatten(1))
        batch = Batch._make(None if column is None else column.unflatten(0, (seeds, size)) for column in batch)
        caches = [stream.proposals for stream in self.streams if stream.proposals is not None]  # all have one, or none
        if not caches:
            return batch

        def proposed(rows: Tensor, picks: Tensor) -> Tensor:
            of_seeds = zip(caches, rows.view(seeds, size), picks, strict=True)
            return torch.stack([cache.of(*of_seed) for cache, *of_seed in of_seeds])

        return batch._replace(
            base_actions=proposed(rows, choices[:, -2]), next_base_actions=proposed(next_rows, choices[:, -1])
        )


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
