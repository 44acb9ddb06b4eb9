"""Online fine-tuning: what the policy meets joins the data, and batches mix the two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from deflow import distributed
from deflow.agents.base import Agent
from deflow.collecting import Collector
from deflow.data.augment import crop, draw_shifts
from deflow.data.memory.replay import Replay
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.seeding import torch_generator
from deflow.types import Batch, Lookahead

log = logging.getLogger(__name__)


class OnlineStream(IterableDataset):
    """Batches of an online stage: before each, the steps in the environment that are due; then a draw from the replay.

    A checkpoint holds how many transitions there were, and the decisions of the episodes under way. A resumed run plays
    these again, so that it goes on to the same bits as one that was never stopped.

    Args:
        collector: plays.
        make_replay: `make_replay(added)`, the ring after so many new transitions.
        last: number after the last batch.
        updates_per_step: updates for each step in an environment, above 0.
        online_share: of new transitions in a batch; None draws uniformly from the ring.
        seed_parts: seed and names that tell this stream's draws from all others.
        span: of each transition.
        crop_probability: of a batch of images, see `draw_shifts`.

    Raises:
        UserError: for a share outside [0, 1], or no updates.
    """

    def __init__(
        self,
        collector: Collector,
        make_replay: Callable[[int], Replay],
        last: int,
        updates_per_step: float,
        online_share: float | None,
        seed_parts: tuple[int | str, ...],
        span: Lookahead,
        crop_probability: float = 0.0,
    ) -> None:
        if updates_per_step <= 0:
            raise UserError(f"updates_per_step must be > 0, got {updates_per_step}")
        if online_share is not None and not 0 <= online_share <= 1:
            raise UserError(f"online_share must be in [0, 1] or null, got {online_share}")
        self.collector, self._make_replay = collector, make_replay
        self.last = last
        self._updates_per_step, self._online_share = updates_per_step, online_share
        self._seed_parts = seed_parts
        self._span = span
        self._crop_probability = crop_probability
        self._first, self._batch_size = 0, 1
        self._added, self._drawn = 0, (0, 0)  # those of the checkpoint
        self.replay: Replay | None = None

    @classmethod
    def of(
        cls,
        agent: Agent,
        source: Source,
        data: Transitions,
        folder: Path,
        stage: str,
        updates: int,
        seed: int,
        span: Lookahead,
        crop_probability: float,
        num_envs: int,
        updates_per_step: float,
        online_share: float | None,
        capacity: int | None,
    ) -> OnlineStream:
        """The stream of a stage with `updates` updates; its new transitions are written into `folder`."""
        collector = Collector(source.make_env, agent, num_envs, span, source.label, seed, source.success, data.units)
        starts = data.chunk_starts(span.horizon)

        def make_replay(added: int) -> Replay:
            steps = stream.rounds(updates) * num_envs
            path = folder / f"{stage}_{distributed.rank()}.bin"
            return Replay(data, starts, agent.spec, steps, path, capacity, added)

        draw = (seed, stage, "batch"), span, crop_probability
        stream = cls(collector, make_replay, updates, updates_per_step, online_share, *draw)
        return stream

    def __len__(self) -> int:
        return self.last

    def start_at(self, first: int, batch_size: int) -> OnlineStream:
        """This stream from batch `first` on, `batch_size` transitions each."""
        self._first, self._batch_size = first, batch_size
        return self

    def __iter__(self) -> Iterator[Batch]:
        self.replay = self._make_replay(self._added)
        self.replay.drawn, self.replay.drawn_new = self._drawn
        for number in range(self._first, self.last):
            for _ in range(self.rounds(number) - self.rounds(number - 1)):
                self.replay.add(self.collector.step())
            generator = torch_generator(torch.device("cpu"), *self._seed_parts, distributed.rank(), number)
            batch = self.replay.sample(self._batch_size, self._online_share, generator, self._span)
            if self._crop_probability:
                batch = crop(batch, draw_shifts(self._batch_size, self._crop_probability, generator))
            yield batch

    def rounds(self, number: int) -> int:
        """Steps that every environment has taken when batch `number` is drawn: one before the first batch."""
        environments = self.collector.num_envs * distributed.world_size()
        return 0 if number < 0 else int(number / (self._updates_per_step * environments)) + 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in plain values."""
        drawn = (0, 0)
        if self.replay is not None:
            self.replay.flush()
            self._added, drawn = self.replay.added, (self.replay.drawn, self.replay.drawn_new)
        return {"added": self._added, "drawn": drawn, "collector": self.collector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was made."""
        self._added, self._drawn = state["added"], state["drawn"]
        self.collector.load_state_dict(state["collector"])
