"""Source: where transitions come from and the environment they were taken in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.shards import map_shards
from deflow.errors import UserError
from deflow.types import Spec

Arrays = dict[str, np.ndarray]
Reward = TypeVar("Reward", float, np.ndarray)

JUMP = 1e-6  # distance from a next observation to the row after it, above which a new trajectory has begun
VALIDATION_SHARE = 0.1  # of the trajectories, where a data set has no validation split of its own


class Source(ABC):
    """A data set: `configs/data/` has one file for each kind.

    Arrays are in OGBench's compact layout: `observations`, `actions`, `rewards`, `masks` and `valids`, one row a
    state. The successor of row `i` is row `i + 1` where `valids[i]` is 1.
    """

    frames: int = 1  # images of an observation

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
    def arrays(self) -> tuple[Arrays, Arrays]:
        """The training and the validation split as they are in the files; `UserError` if a file is broken.

        Rewards are the environment's own: `load` labels them, see `label`.
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

    def load(self) -> tuple[Transitions, Transitions]:
        """Training and validation transitions, checked."""
        return self._checked(self.arrays())

    def load_shards(
        self, shards: Sequence[Path], arrays: Callable[[Path], tuple[Arrays, Arrays]], folder: Path
    ) -> tuple[Transitions, Transitions]:
        """Training transitions of all shards, mapped into memory; those of the first for validation.

        Args:
            shards: files, in order.
            arrays: both splits of one of them.
            folder: of the unpacked columns.
        """
        _, validation = self._checked(arrays(shards[0]))
        train = map_shards(shards, lambda shard: self._checked(arrays(shard))[0], folder)
        return replace(train, frames=self.frames), validation

    def _checked(self, arrays: tuple[Arrays, Arrays]) -> tuple[Transitions, Transitions]:
        train, validation = ({**part, "rewards": self.label(part["rewards"])} for part in arrays)
        return (
            Transitions.from_compact(train, self.name, self.frames),
            Transitions.from_compact(validation, f"{self.name} (val)", self.frames),
        )


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
        next_observations: as `observations`. If given, a row whose successor is not the next row ends a trajectory
            too, and every end keeps its last state; without it, the last row of a trajectory is only a successor.

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
        followed[:-1] |= np.linalg.norm(next_observations[:-1] - observations[1:], axis=1) > JUMP
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


def split(arrays: Arrays, seed: int) -> tuple[Arrays, Arrays]:
    """Split by trajectories, a tenth of them (at least one) for validation.

    Raises:
        UserError: if there are not two trajectories.
    """
    ends = np.flatnonzero(arrays["valids"] == 0)
    if len(ends) < 2:
        raise UserError("the data hold a single trajectory: a validation split needs at least two")
    number = np.searchsorted(ends, np.arange(ends[-1] + 1))  # of each row's trajectory
    chosen = np.random.default_rng(seed).permutation(len(ends))[: max(1, round(VALIDATION_SHARE * len(ends)))]
    held_out = np.isin(number, chosen)
    rows = {key: column[: len(held_out)] for key, column in arrays.items()}
    return (
        {key: column[~held_out] for key, column in rows.items()},
        {key: column[held_out] for key, column in rows.items()},
    )
