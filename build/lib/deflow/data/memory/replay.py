"""Replay: transitions from the environment, in one ring with the data set's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deflow.data.memory.frame_file import FrameFile
from deflow.data.memory.transitions import Transitions
from deflow.errors import UserError
from deflow.files import open_to_append, sync
from deflow.types import Batch, Lookahead, Spec

DEFAULT_CAPACITY = 2_000_000


class Replay:
    """A ring that begins with the data set's transitions; each new one beyond its capacity drops the oldest.

    New transitions also go, in order, into a file that is only ever appended to. Together with their number, which a
    checkpoint holds, it gives back the ring as it was; what a killed process wrote after the checkpoint is cut off.
    Images stay on disk, each frame once, in a file beside it.

    Args:
        data: the data set.
        starts: its rows at which transitions (or chunks) start, oldest first.
        spec: sizes of the task.
        steps: transitions that will be added at most.
        path: of the file.
        capacity: of the ring; None is the larger of 2M and one more than the data.
        added: transitions to take over from the file; the rest of it is dropped.

    Raises:
        UserError: if the capacity is below 1, or the file holds fewer than `added` transitions.
    """

    def __init__(
        self,
        data: Transitions,
        starts: Tensor,
        spec: Spec,
        steps: int,
        path: Path,
        capacity: int | None = None,
        added: int = 0,
    ) -> None:
        self.capacity = max(DEFAULT_CAPACITY, len(starts) + 1) if capacity is None else capacity
        if self.capacity < 1:
            raise UserError(f"the replay's capacity must be at least 1, got {capacity}")
        self._data, self._starts = data, starts
        seen = spec.observation_dim if spec.image is None else data.frames
        self._widths = [seen, spec.action_dim, 1, 1, seen, spec.action_dim]
        if data.returns is not None:
            self._widths.append(1)
        self._rows = torch.empty(min(self.capacity, steps), sum(self._widths))
        self.added = 0
        self.drawn, self.drawn_new = 0, 0  # transitions, and new ones among them, since they were last set to 0
        numbers = added * sum(self._widths)
        self._file = open_to_append(path, 4 * numbers, "transitions that the checkpoint counts")
        rows = torch.from_numpy(np.fromfile(path, np.float32, numbers).reshape(added, sum(self._widths)))
        self._frames = None if spec.image is None else self._open_frames(path.with_suffix(".frames"), rows)
        self._keep(rows)

    def add(self, transitions: Batch) -> None:
        """Add transitions, in order."""
        columns = [
            self._numbers(transitions.observations),
            transitions.actions,
            transitions.rewards[:, None],
            transitions.discounts[:, None],
            self._numbers(transitions.next_observations),
            transitions.next_actions,
        ]
        if transitions.returns is not None:
            columns.append(transitions.returns[:, None])
        rows = torch.cat(columns, dim=1).float()
        self._file.write(rows.numpy().tobytes())
        self._keep(rows)

    def flush(self) -> None:
        """See to it that all that was added is on disk."""
        if self._frames is not None:
            self._frames.flush()
        sync(self._file)

    @property
    def kept_data(self) -> int:
        """Transitions of the data set that are still in the ring."""
        return min(len(self._starts), max(0, self.capacity - self.added))

    @property
    def kept_new(self) -> int:
        """New transitions in the ring."""
        return min(self.added, len(self._rows))

    def sample(
        self,
        size: int,
        online_share: float | None,
        generator: torch.Generator,
        span: Lookahead,
    ) -> Batch:
        """`size` transitions with replacement.

        Args:
            size: of the batch.
            online_share: of new transitions in the batch, in [0, 1]; None draws uniformly from the ring. As long as
                there are none of one kind, all are of the other.
            generator: of the draws.
            span: of the data set's transitions; new ones have theirs since they were collected.
        """
        if online_share is None:
            picks = torch.randint(self.kept_data + self.kept_new, (size,), generator=generator)
            new = int((picks >= self.kept_data).sum())
        else:
            new = round(online_share * size)
        new = 0 if not self.kept_new else (size if not self.kept_data else new)
        self.drawn, self.drawn_new = self.drawn + size, self.drawn_new + new
        from_data = torch.randint(max(self.kept_data, 1), (size - new,), generator=generator)
        from_ring = torch.randint(max(self.kept_new, 1), (new,), generator=generator)
        oldest = len(self._starts) - self.kept_data
        batch, _ = self._data.batch(self._starts[oldest + from_data], span)
        s, a, r, d, s_next, a_next, *returns = self._rows[from_ring].split(self._widths, dim=1)
        return Batch(
            torch.cat([batch.observations, self._seen(s)]),
            torch.cat([batch.actions, a]),
            torch.cat([batch.rewards, r[:, 0]]),
            torch.cat([batch.discounts, d[:, 0]]),
            torch.cat([batch.next_observations, self._seen(s_next)]),
            torch.cat([batch.next_actions, a_next]),
            returns=None if batch.returns is None else torch.cat([batch.returns, returns[0][:, 0]]),
        )

    def _open_frames(self, path: Path, rows: Tensor) -> FrameFile:
        """The frames that `rows` speak of, and no more."""
        s, _, _, _, s_next, *_ = rows.split(self._widths, dim=1)
        count = int(torch.cat([s, s_next]).max()) + 1 if len(rows) else 0
        return FrameFile(path, self._data.states.shape[1:], count)

    def _numbers(self, observations: Tensor) -> Tensor:
        """Observations as they stand in a row: a state as it is, of an image the numbers of its frames."""
        if self._frames is None:
            return observations
        return self._frames.add(observations.flatten(0, 1)).reshape(-1, self._data.frames).float()  # exact up to 2^24

    def _seen(self, numbers: Tensor) -> Tensor:
        """The inverse of `_numbers`."""
        if self._frames is None:
            return numbers
        return self._frames.read(numbers.flatten().long()).unflatten(0, numbers.shape)

    def _keep(self, rows: Tensor) -> None:
        size = len(self._rows)
        numbers = torch.arange(self.added, self.added + len(rows))
        self._rows[numbers[-size:] % size] = rows[-size:]
        self.added += len(rows)
