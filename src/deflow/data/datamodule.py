"""OfflineDataModule: whole random batches straight from memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from deflow import distributed
from deflow.cores import usable_cores
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import Source
from deflow.data.streams import BatchStream, PacedStream, Prefetched, SeedStream
from deflow.errors import UserError
from deflow.ranges import Count, Discount, Positive, Probability, Seed
from deflow.types import Lookahead
from deflow.units import scale_and_shift

log = logging.getLogger(__name__)

MEBI = 2**20
MOST_THREADS = 8  # that make batches ahead
DATA_SHARE = 0.5  # of a GPU's free memory that the data may take; networks, gradients and frames need the rest


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
        if self.validation is None:
            return
        if self.validation.rewards is self.transitions.rewards:  # set apart from the same columns
            self.validation = replace(self.validation, returns=self.transitions.returns)
        else:
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
