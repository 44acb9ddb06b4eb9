"""Source: where transitions come from and the environment they were taken in."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch

from deflow.data.memory.transitions import Transitions
from deflow.data.scales import negligible
from deflow.data.sources.columns import Arrays
from deflow.envs.meeting import meet
from deflow.envs.success import SuccessRule
from deflow.types import Spec
from deflow.units import Numbers

log = logging.getLogger(__name__)

Reward = TypeVar("Reward", float, np.ndarray)

# Share of a dimension's standard deviation by which a next observation may be off the row after it: what rounding to
# another precision does, and no step from one trajectory to another.
ROUNDING = 1e-2
ALMOST_0 = 1e-5  # of the largest number up to 0.1: what is 0 but for a simulator's arithmetic
CHOICES = 32  # whole numbers in the actions, of which more are steps of a motor
BEYOND = 1e-3  # by which an action may be outside its range without a word
ROWS_AT_ONCE = 65_536
VALIDATION_SHARE = 0.1  # of the trajectories, where a data set has no validation split of its own


class Source(ABC):
    """A data set: `configs/data/` has one file for each kind.

    Arrays are in OGBench's compact layout: `observations`, `actions`, `rewards`, `masks` and `valids`, one row a
    state. The successor of row `i` is row `i + 1` where `valids[i]` is 1.
    """

    frames: int = 1  # images of an observation
    standardise: bool = False  # whether networks see observations less the data's mean, over its standard deviation
    success = SuccessRule()  # how success is read off the environment
    seed: int = 0  # of the choice of validation trajectories, where the data come without a split

    @property
    @abstractmethod
    def name(self) -> str:
        """The data set's name."""

    @property
    @abstractmethod
    def task(self) -> str:
        """What is to be done in the environment; checkpoints of one task do not fit another."""

    @abstractmethod
    def prepare(self) -> None:
        """See to it that the files are on disk; `UserError` if they are not there and cannot be had."""

    @abstractmethod
    def arrays(self) -> tuple[Arrays, Arrays | None]:
        """The data as they are in the files, and the validation split if they come with one.

        Rewards are the environment's own: `load` labels them, see `label`.

        Raises:
            UserError: if a file is broken, or holds what cannot be meant.
        """

    @abstractmethod
    def spec(self) -> Spec:
        """Sizes of observations and actions."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Where the data came from, for the run's summary; `generated` says whether this package made them."""

    @property
    def has_env(self) -> bool:
        """Whether there is an environment to evaluate in."""
        return True

    @abstractmethod
    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        """The environment in which a policy is evaluated."""

    def meet_environment(self, spec: Spec) -> None:
        """Compare the environment with the data, see `meet`.

        Args:
            spec: of the data.

        Raises:
            UserError: if the one does not fit the other.
        """
        if self.has_env:
            meet(self.make_env(), spec, self.success, self.task)

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What must be known to compare a result with another: rewards, success, score."""

    def tasks(self) -> dict[str, Source]:
        """The data set with the rewards of each task that it can be labelled with."""
        return {self.task: self}

    def label(self, reward: Reward) -> Reward:
        """What an agent is told of a reward: of those of `arrays`, and of those that the environment gives online."""
        return reward

    def score(self, episode_return: float) -> float | None:
        """The normalised score of a return, in the units that `protocol()["score"]` names; None if there is none."""
        return None

    def load(self) -> tuple[Transitions, Transitions | None]:
        """Training and validation transitions, checked; the latter None, which is said, of a single trajectory."""
        train, validation = self.arrays()
        whole = self.with_units(self.transitions(train, self.name))
        if validation is None:
            return split(whole, self.seed, self.name)
        return whole, replace(self.transitions(validation, f"{self.name} (val)"), units=whole.units)

    def with_units(self, whole: Transitions) -> Transitions:
        """The whole set in its units, see `Units`; what will be clipped is said."""
        _say_of_choices(whole.actions.numpy(), self.name)
        if self.standardise:
            mean, std = moments(whole)
            whole = replace(whole, units=whole.units._replace(mean=mean, std=std))
        decided = np.abs(whole.units.decided(whole.actions.numpy())) > 1 + BEYOND
        outside = int(decided.any(1).sum())
        if outside:
            log.warning("%s: %d rows have actions outside what a policy decides; they are clipped", self.name, outside)
        return whole

    def transitions(self, arrays: Arrays, origin: str) -> Transitions:
        """Arrays as agents learn from them: checked, and their rewards labelled."""
        labelled = {**arrays, "rewards": self.label(np.asarray(arrays["rewards"]))}
        return Transitions.from_compact(labelled, origin, self.frames)


def compact(
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    masks: np.ndarray,
    ends: np.ndarray,
    next_observations: np.ndarray | None = None,
) -> Arrays:
    """Compact layout from one row a transition.

    Args:
        observations: shape (rows, observation_dim).
        actions: shape (rows, action_dim).
        rewards: shape (rows,).
        masks: whether to bootstrap; where it is 0 the successor does not matter. Shape (rows,).
        ends: whether a trajectory ends with the row, shape (rows,).
        next_observations: as `observations`. If given, a row whose successor is not the next row (but for rounding)
            ends a trajectory too, and every end keeps its last state; without it, a trajectory's last row is only a
            successor.

    Returns:
        The columns. In the row of a last state that was added the action is the one before: what would have been
        done there is not known.
    """
    rows = len(observations)
    ends = ends.astype(bool).copy()
    ends[-1] = True
    # A row more after an end: the state in which the trajectory ended. Without next observations that is known (not
    # to matter) only where the task ended; where a trajectory was cut, its last row is a successor and no more.
    followed = ends.copy()
    if next_observations is not None:
        followed[:-1] |= _jumps(next_observations[:-1], observations[1:])
    else:
        followed &= masks == 0
    place = np.arange(rows) + np.concatenate([[0], np.cumsum(followed)[:-1]])
    size = rows + int(followed.sum())

    def spread(column: np.ndarray) -> np.ndarray:
        wide = np.zeros((size, *column.shape[1:]), column.dtype)
        wide[place] = column
        return wide

    states, taken = spread(observations), spread(actions)
    taken[place[followed] + 1] = actions[followed]
    states[place[followed] + 1] = (observations if next_observations is None else next_observations)[followed]
    return {
        "observations": states,
        "actions": taken,
        "rewards": spread(rewards),
        "masks": spread(masks),
        "valids": spread((followed | ~ends).astype(np.float32)),
    }


def _jumps(next_observations: np.ndarray, rows_after: np.ndarray) -> np.ndarray:
    """Whether the row after a transition is another state than its next observation, shape (rows,)."""
    if len(rows_after) == 0:
        return np.zeros(0, bool)
    axes = tuple(range(1, rows_after.ndim))
    after = rows_after.astype(np.float64)
    rounded = max(_precision(next_observations), _precision(rows_after)) * np.abs(after)  # also of what never changes
    recomputed = ALMOST_0 * min(0.1, np.abs(after).max())
    return (np.abs(next_observations - after) > ROUNDING * after.std(0) + rounded + recomputed).any(axes)


def _precision(column: np.ndarray) -> float:
    """The share by which a number may differ from what was measured: float64 may hold what was float32 before."""
    return float(np.finfo(np.float16 if column.dtype == np.float16 else np.float32).eps)


def unless_one(low: np.ndarray, high: np.ndarray) -> tuple[Numbers, Numbers] | tuple[None, None]:
    """The actions that a policy decides as -1 and 1, a number a dimension; None, if these are -1 and 1.

    A dimension in which `low` is `high`, so that the action never changes, is decided as 0.
    """
    half = np.where(high > low, 0, 1)
    low, high = low - half, high + half
    if (low == -1).all() and (high == 1).all():
        return None, None
    log.info("actions from %s to %s are decided as -1 to 1", low.tolist(), high.tolist())
    return tuple(low.tolist()), tuple(high.tolist())


def _say_of_choices(actions: np.ndarray, name: str) -> None:
    """Say what becomes of floats that may be numbers of choices: whole, not negative and few."""
    # A look at some rows is nearly always enough to see that they are no whole numbers.
    if not all(np.array_equal(part, np.trunc(part)) for part in (actions[:1000], actions)):
        return
    values = np.unique(actions)
    if values.size and values[0] >= 0 and values[-1] > 0 and len(values) <= CHOICES:
        shown = f"whole numbers from {values[0]:g} to {values[-1]:g}"
        log.warning("%s: all actions are %s: taken as amounts, as no agent here takes choices", name, shown)


def moments(whole: Transitions) -> tuple[Numbers, Numbers]:
    """Mean and standard deviation of the states, a number a dimension; 1 for what does not change but by rounding."""
    parts, count = whole.starts.split(ROWS_AT_ONCE), len(whole.starts)  # not all at once: they may be mapped
    total = size = torch.zeros(())
    for rows in parts:
        states = whole.states[rows]
        total, size = total + states.double().sum(0), torch.maximum(size, states.abs().amax(0))
    mean = total / count
    squares = sum(((whole.states[rows].double() - mean).square().sum(0) for rows in parts), torch.zeros(()))
    std = (squares / max(count - 1, 1)).sqrt()
    std = torch.where(std > torch.from_numpy(negligible(size.numpy(), std.numpy())), std, 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def split(transitions: Transitions, seed: int, origin: str) -> tuple[Transitions, Transitions | None]:
    """Set a tenth of the trajectories (at least one) apart for validation; both splits share the columns.

    Returns:
        The transitions of the others, and those set apart; None, which is said, if there is but one trajectory.
    """
    trajectories, number = transitions.first_rows[transitions.starts].unique(return_inverse=True)
    count = len(trajectories)
    if count < 2:
        log.warning("%s holds a single trajectory: all of it is trained on, and nothing validated", origin)
        return transitions, None
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, round(VALIDATION_SHARE * count))]
    held_out = torch.isin(number, torch.from_numpy(chosen))
    train, validation = (transitions.starts[rows] for rows in (~held_out, held_out))
    return replace(transitions, starts=train), replace(transitions, starts=validation)
