"""A data set in memory: every state once, and where the transitions start."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deflow.errors import UserError
from deflow.types import Batch, Lookahead
from deflow.units import AS_THEY_ARE, Units

log = logging.getLogger(__name__)

# Actions are kept inside this bound, as the papers do, so that a squashed policy could produce them.
ACTION_BOUND = 1.0 - 1e-5
CONVERTED = 100_000  # rows at a time


@dataclass(frozen=True)
class Transitions:
    """Trajectories stored compactly: row `i + 1` is the successor of row `i` wherever a transition starts at `i`.

    Keeping each state once halves the memory and lets anything computed for a state serve both as `s` and `s'`.
    Frames are kept once, too: an observation of several is put together when it is asked for.
    """

    states: Tensor  # (rows, observation_dim), float32, or frames of uint8, (rows, height, width, channels)
    actions: Tensor  # (rows, action_dim), float32, in the environment's units; at a last state the one before again
    rewards: Tensor  # (rows,), float32, as the source labels them
    masks: Tensor  # (rows,), float32
    starts: Tensor  # (transitions,), int64: the rows that have a successor
    returns: Tensor | None = None  # (rows,), float32; see `with_returns`
    frames: int = 1  # images of an observation, the newest last
    units: Units = AS_THEY_ARE  # of `observations`, `decisions`, `learned_rewards`, returns and batches, not of columns

    @classmethod
    def from_compact(cls, arrays: Mapping[str, Any], origin: str, frames: int = 1) -> Transitions:
        """From OGBench's compact layout (`observations`, `actions`, `rewards`, `masks`, `valids`).

        Args:
            arrays: columns; observations of uint8 are images.
            origin: what to call the data in an error.
            frames: images of an observation.

        Raises:
            UserError: naming `origin`, if lengths differ, a value is not finite or no transition is left.
        """
        columns = {key: np.asarray(arrays[key], np.float32) for key in ("actions", "rewards", "masks")}
        states = np.asarray(arrays["observations"])
        is_image = states.dtype == np.uint8 and states.ndim > 2
        columns["observations"] = states if is_image else states.astype(np.float32, copy=False)
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{origin}: columns of different lengths ({lengths}); make or download the file again")
        for key, column in columns.items():
            if column.dtype == np.uint8:
                continue
            bad = int((~np.isfinite(column)).reshape(len(column), -1).any(1).sum())
            if bad:
                raise UserError(f"{origin}: '{key}' has NaN or infinite values in {bad} rows; repair or remove them")
        starts = np.flatnonzero(np.asarray(arrays["valids"])[: len(columns["actions"]) - 1])
        if len(starts) == 0:
            raise UserError(f"{origin}: no transitions (every row ends a trajectory)")
        return cls(
            states=torch.from_numpy(columns["observations"]),
            actions=torch.from_numpy(columns["actions"]),
            rewards=torch.from_numpy(columns["rewards"]),
            masks=torch.from_numpy(columns["masks"]),
            starts=torch.from_numpy(starts),
            frames=frames,
        )

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def has_successor(self) -> Tensor:
        """Whether a transition starts at each row, bool of shape (rows,)."""
        none = torch.zeros(len(self.states), dtype=torch.bool, device=self.device)
        return none.index_fill_(0, self.starts, True)

    @property
    def device(self) -> torch.device:
        """Where the data lie."""
        return self.states.device

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(column.nbytes for column in self._columns().values())

    def on(self, device: torch.device) -> Transitions:
        """A copy on a device, in the networks' units already, so that no batch needs to be converted."""
        columns: dict[str, Any] = self._columns()
        if self.units.mean is not None:
            columns["states"] = _in_chunks(self.units.observed, self.states)
        if self.units.low is not None:
            columns["actions"] = _in_chunks(self.units.decided, self.actions)
        columns["rewards"] = self.units.learned(self.rewards)
        return replace(self, units=AS_THEY_ARE, **{name: column.to(device) for name, column in columns.items()})

    def _columns(self) -> dict[str, Tensor]:
        names = ("states", "actions", "rewards", "masks", "starts", "returns")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @cached_property
    def first_rows(self) -> Tensor:
        """The row with which each row's trajectory begins, int64 of shape (rows,)."""
        rows = torch.arange(len(self.states), device=self.device)
        begins = ~self.has_successor.roll(1)
        begins[0] = True
        return torch.where(begins, rows, 0).cummax(0).values

    @cached_property
    def last_rows(self) -> Tensor:
        """The row with which each row's trajectory ends, int64 of shape (rows,)."""
        rows = torch.arange(len(self.states), device=self.device)
        ends = torch.where(self.has_successor, len(self.states) - 1, rows)
        return ends.flip(0).cummin(0).values.flip(0)

    @property
    def longest(self) -> int:
        """Transitions of the longest trajectory."""
        return int((self.last_rows - self.first_rows).max())

    def observations(self, rows: Tensor) -> Tensor:
        """What an agent sees in the states `rows`; before a trajectory's first frame, that frame again.

        Shape (batch, observation_dim), or (batch, frames, height, width, channels).
        """
        if self.states.ndim == 2:
            states = self.states.index_select(0, rows)
            return states if self.units.mean is None else torch.from_numpy(self.units.observed(states.numpy()))
        back = torch.arange(self.frames - 1, -1, -1, device=self.device)
        of_frames = torch.maximum(rows[:, None] - back, self.first_rows.index_select(0, rows)[:, None])
        return self.states.index_select(0, of_frames.flatten()).unflatten(0, of_frames.shape)

    def decisions(self, rows: Tensor) -> Tensor:
        """The actions of `rows` as a policy would have decided them, inside [-1, 1], shape (batch, action_dim)."""
        actions = self.actions.index_select(0, rows)
        if self.units.low is not None:
            actions = torch.from_numpy(self.units.decided(actions.numpy()))
        return actions.clamp(-ACTION_BOUND, ACTION_BOUND)

    def learned_rewards(self, rows: Tensor) -> Tensor:
        """The rewards of `rows` as the networks learn from them, shape (batch,)."""
        return self.units.learned(self.rewards.index_select(0, rows))

    def with_returns(self, discount: float) -> Transitions:
        """The same transitions with `returns`, for agents that read `Batch.returns`; see `returns_to_go`."""
        ends = ~self.has_successor.roll(-1)
        ends[-1] = True
        # A last state's row is of no trajectory.
        rewards = self.units.learned(self.rewards).where(self.has_successor, 0.0)
        if rewards.max() > 0 and (self.masks[ends & self.has_successor] > 0).any():
            log.warning("returns of trajectories that were cut count what the data hold: there are rewards above 0")
        returns = returns_to_go(rewards.tolist(), self.masks.tolist(), ends.tolist(), discount)
        return replace(self, returns=torch.tensor(returns))

    def returns_from(self, rows: Tensor, discount: float) -> Tensor:
        """The returns from some rows on, as `with_returns` has them, without a look at other trajectories.

        Args:
            rows: at which transitions start, int64 of shape (batch,).
            discount: gamma.

        Returns:
            Float32 of shape (batch,).
        """
        lasts = (~self.has_successor).nonzero().squeeze(1)  # of every trajectory
        of_trajectory = torch.searchsorted(lasts, rows)
        returns = torch.empty(len(rows), device=self.device)
        for number in of_trajectory.unique().tolist():
            first, last = int(lasts[number - 1]) + 1 if number else 0, int(lasts[number])
            span = torch.arange(first, last, device=self.device)
            rewards, masks = self.learned_rewards(span).tolist(), self.masks.index_select(0, span).tolist()
            of_all = returns_to_go(rewards, masks, [False] * (last - first - 1) + [True], discount)
            here = of_trajectory == number
            returns[here] = torch.tensor(of_all, device=self.device)[rows[here] - first]
        return returns

    def chunk_starts(self, horizon: int) -> Tensor:
        """The rows from which the data go on for `horizon` transitions, int64 of shape (chunks,).

        Raises:
            UserError: if no trajectory is that long.
        """
        if horizon == 1:
            return self.starts  # not a copy: they may be mapped, and more than fit into memory
        whole = torch.ones(len(self.starts), dtype=torch.bool, device=self.device)
        for step in range(1, horizon):
            whole &= self.has_successor[(self.starts + step).clamp(max=len(self.states) - 1)]
        if not whole.any():
            raise UserError(f"agent.horizon={horizon} is longer than every trajectory of the data")
        return self.starts[whole]

    def batch(self, rows: Tensor, span: Lookahead) -> tuple[Batch, Tensor]:
        r"""The transitions that start at `rows`, and the rows of their next states.

        The reward is :math:`\sum_{k<h} \gamma^k r_{t+k}`, the next state :math:`s_{t+h}` and the discount
        :math:`\gamma^h m_{t+h-1}`, where `h` is `span.steps`, or less where the task or the trajectory ends before.
        With a horizon above 1 the actions are those of so many steps, one after the other.

        Args:
            rows: int64 of shape (batch,); with a horizon above 1 they must be of `chunk_starts(span.horizon)`.
            span: of each transition.
        """
        rewards = self.learned_rewards(rows)
        discounts = span.discount * self.masks.index_select(0, rows)
        next_rows = rows + 1
        for _ in range(span.steps - 1):
            goes_on = (discounts > 0) & self.has_successor.index_select(0, next_rows.clamp(max=len(self.states) - 1))
            here = torch.where(goes_on, next_rows, rows)
            rewards = rewards + torch.where(goes_on, discounts * self.learned_rewards(here), 0.0)
            discounts = torch.where(goes_on, span.discount * discounts * self.masks.index_select(0, here), discounts)
            next_rows = next_rows + goes_on.long()
        batch = Batch(
            observations=self.observations(rows),
            actions=self._chunks(rows, span.horizon),
            rewards=rewards,
            discounts=discounts,
            next_observations=self.observations(next_rows),
            next_actions=self._chunks(next_rows, span.horizon),
            returns=None if self.returns is None else self.returns.index_select(0, rows),
            path=self._path(rows, span.horizon) if span.path else None,
        )
        return batch, next_rows

    def _path(self, rows: Tensor, steps: int) -> Tensor:
        """The states after each of so many steps, (batch, steps, observation_dim)."""
        return torch.stack([self.observations(rows + step) for step in range(1, steps + 1)], dim=1)

    def _chunks(self, rows: Tensor, horizon: int) -> Tensor:
        """The actions from `rows` on, (batch, horizon * action_dim); a trajectory's last one is repeated beyond it."""
        if horizon == 1:
            return self.decisions(rows)
        last = self.last_rows.index_select(0, rows)
        return torch.cat([self.decisions((rows + k).minimum(last)) for k in range(horizon)], dim=-1)


def as_arrays(transitions: Transitions) -> dict[str, np.ndarray]:
    """The columns in compact layout, actions and rewards in the networks' units; not copied but for those."""
    return {
        "observations": transitions.states.numpy(),
        "actions": transitions.units.decided(transitions.actions.numpy()),
        "rewards": transitions.units.learned(transitions.rewards.numpy()),
        "masks": transitions.masks.numpy(),
        "valids": transitions.has_successor.numpy(),
    }


def returns_to_go(
    rewards: Sequence[float], masks: Sequence[float], ends: Sequence[bool], discount: float
) -> list[float]:
    r"""The return from each row on, :math:`G_t = r_t + \gamma m_t G_{t+1}`.

    A trajectory that was cut, and that only had costs (rewards up to 0), is taken to go on with its last one for ever:
    where every step costs the same until the task is done that is exact, and it is what Cal-QL's released code does
    there. Of any other nothing is known beyond its end, and counted as 0.

    Args:
        rewards: of each row.
        masks: 0 where the task ended.
        ends: whether the row after this one is of another trajectory.
        discount: gamma.
    """
    returns, later = [], 0.0
    costs = _only_costs(rewards, ends)
    for reward, mask, end, is_cost in zip(*map(reversed, (rewards, masks, ends, costs)), strict=True):
        if end:
            later = reward / (1.0 - discount) if is_cost else 0.0
        later = reward + discount * mask * later
        returns.append(later)
    return returns[::-1]


def _only_costs(rewards: Sequence[float], ends: Sequence[bool]) -> list[bool]:
    """Whether no reward of a row's trajectory is above 0."""
    found: list[bool] = []
    length, highest = 0, -math.inf
    for reward, end in zip(rewards, ends, strict=True):
        length, highest = length + 1, max(highest, reward)
        if end:
            found += [highest <= 0] * length
            length, highest = 0, -math.inf
    return found + [highest <= 0] * length


def _in_chunks(convert: Callable[[np.ndarray], np.ndarray], column: Tensor) -> Tensor:
    """The column converted, without a copy of all of it in float64 on the way."""
    return torch.cat([torch.from_numpy(convert(part.numpy())) for part in column.split(CONVERTED)])
