"""A data set in memory: every state once, and where the transitions start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deflow.errors import UserError
from deflow.types import Batch

log = logging.getLogger(__name__)

# Actions are kept inside this bound, as the papers do, so that a squashed policy could produce them.
ACTION_BOUND = 1.0 - 1e-5


@dataclass(frozen=True)
class Transitions:
    """Trajectories stored compactly: row `i + 1` is the successor of row `i` wherever a transition starts at `i`.

    Keeping each state once halves the memory and lets anything computed for a state serve both as `s` and `s'`.
    """

    states: Tensor  # (rows, observation_dim), float32
    actions: Tensor  # (rows, action_dim), float32
    rewards: Tensor  # (rows,), float32
    masks: Tensor  # (rows,), float32
    starts: Tensor  # (transitions,), int64: the rows that have a successor

    @classmethod
    def from_compact(cls, arrays: Mapping[str, Any], origin: str) -> Transitions:
        """From OGBench's compact layout (`observations`, `actions`, `rewards`, `masks`, `valids`).

        Raises:
            UserError: naming `origin`, if lengths differ, a value is not finite or no transition is left.
        """
        columns = {key: np.asarray(arrays[key], np.float32) for key in ("observations", "actions", "rewards", "masks")}
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{origin}: columns of different lengths ({lengths}); make or download the file again")
        for key, column in columns.items():
            bad = int((~np.isfinite(column)).reshape(len(column), -1).any(1).sum())
            if bad:
                raise UserError(f"{origin}: '{key}' has NaN or infinite values in {bad} rows; repair or remove them")
        starts = np.flatnonzero(np.asarray(arrays["valids"])[: len(columns["actions"]) - 1])
        if len(starts) == 0:
            raise UserError(f"{origin}: no transitions (every row ends a trajectory)")
        outside = int((np.abs(columns["actions"]) > 1.0 + 1e-6).any(1).sum())
        if outside:
            log.warning("%s: %d rows have actions outside [-1, 1]; they are clipped", origin, outside)
        return cls(
            states=torch.from_numpy(columns["observations"]),
            actions=torch.from_numpy(columns["actions"]).clamp(-ACTION_BOUND, ACTION_BOUND),
            rewards=torch.from_numpy(columns["rewards"]),
            masks=torch.from_numpy(columns["masks"]),
            starts=torch.from_numpy(starts),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: Tensor) -> Batch:
        """The transitions that start at `rows`, int64 of shape (batch,)."""
        return Batch(
            observations=self.states.index_select(0, rows),
            actions=self.actions.index_select(0, rows),
            rewards=self.rewards.index_select(0, rows),
            masks=self.masks.index_select(0, rows),
            next_observations=self.states.index_select(0, rows + 1),
        )
