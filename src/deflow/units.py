"""Units: what lies between the environment's numbers and the networks'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deflow.errors import UserError
from deflow.types import Spec

Numbers = tuple[float, ...]
Array = TypeVar("Array", np.ndarray, Tensor)
Rewards = TypeVar("Rewards", float, np.ndarray, Tensor)


class Units(NamedTuple):
    """Networks see `(observation - mean) / std` and decide actions in [-1, 1], which are those from `low` to `high`.

    They learn from `scale * reward + shift`. The former are one number a dimension; None leaves the numbers as they
    are. Images are never standardised.
    """

    low: Numbers | None = None
    high: Numbers | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    reward: Numbers | None = None  # scale and shift

    def with_rewards(self, scale: float, shift: float) -> Units:
        """The same with rewards that are scaled, by more than 0, and then shifted."""
        return self._replace(reward=None if (scale, shift) == (1, 0) else (float(scale), float(shift)))

    @classmethod
    def of(cls, content: Mapping[str, Any] | None, spec: Spec) -> Units:
        """What `_asdict` gave, also after it went through a file; those of no change, if there is nothing.

        Raises:
            ValueError: for what it cannot have given for a task of these sizes.
        """
        found = {key: None if value is None else tuple(map(float, value)) for key, value in (content or {}).items()}
        if unknown := found.keys() - set(cls._fields):
            raise ValueError(f"no units: {sorted(unknown)}")
        units = cls(**found)
        action_dim = spec.action_dim // spec.horizon
        sizes = {"low": action_dim, "high": action_dim, "mean": spec.observation_dim, "std": spec.observation_dim}
        for (name, numbers), size in zip(units._asdict().items(), (*sizes.values(), 2), strict=True):
            if numbers is not None and not (len(numbers) == size and np.isfinite(numbers).all()):
                raise ValueError(f"{name} needs {size} finite numbers, not {numbers}")
        if (units.low is None) != (units.high is None) or (units.mean is None) != (units.std is None):
            raise ValueError("one of a pair is missing")
        low, high = units.low or (), units.high or ()
        if any(a >= b for a, b in zip(low, high, strict=True)) or min(units.std or (1,)) <= 0:
            raise ValueError("an interval or a deviation is empty")
        return units

    def is_close(self, other: Units) -> bool:
        """Whether these are the same but for rounding: sums over the data depend on the machine's threads."""
        pairs = list(zip(self, other, strict=True))
        if any((mine is None) != (theirs is None) for mine, theirs in pairs):
            return False
        found = [(a, b) for a, b in pairs if a is not None and b is not None]
        return all(len(a) == len(b) and np.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in found)

    def observed(self, observations: Array) -> Array:
        """The environment's observations, shape (..., observation_dim), as the networks see them."""
        if self.mean is None or self.std is None:
            return observations
        return _float32((observations - _like(observations, self.mean)) / _like(observations, self.std))

    def decided(self, actions: np.ndarray) -> np.ndarray:
        """The environment's actions, shape (..., action_dim), as the networks decide them."""
        if self.low is None:
            return actions
        low, high = np.asarray(self.low), np.asarray(self.high)
        return (2 * (actions - low) / (high - low) - 1).astype(np.float32)

    def executed(self, actions: Array) -> Array:
        """The networks' actions, shape (..., action_dim), as the environment takes them: the inverse of `decided`."""
        if self.low is None or self.high is None:
            return actions
        low, high = _like(actions, self.low), _like(actions, self.high)
        return _float32(low + (actions + 1) / 2 * (high - low))

    def learned(self, rewards: Rewards) -> Rewards:
        """Rewards of single steps, as the source labels them, as the networks learn from them."""
        if self.reward is None:
            return rewards
        scale, shift = self.reward
        return rewards * scale + shift


def scale_and_shift(scale: float | Literal["auto"], shift: float, rewards: np.ndarray) -> tuple[float, float]:
    """What `Units.with_rewards` takes; `auto` gives the data's rewards mean 0 and deviation 1 before the shift.

    Args:
        scale: as set.
        shift: as set, added to the scaled rewards.
        rewards: the data's, as their source labels them.

    Raises:
        UserError: if all rewards are the same, so that `auto` has nothing to scale by.
    """
    if scale != "auto":
        return scale, shift
    deviation = float(rewards.std(dtype=np.float64))
    if deviation == 0:
        raise UserError("data.reward_scale=auto: all rewards are the same, so that nothing can scale them")
    return 1 / deviation, shift - float(rewards.mean(dtype=np.float64)) / deviation


def _like(array: Array, numbers: Numbers) -> Array:
    """The numbers in float64, as an array where `array` is one, as a tensor beside it where it is a tensor."""
    if isinstance(array, Tensor):
        return torch.tensor(numbers, dtype=torch.float64, device=array.device)
    return np.asarray(numbers)


def _float32(array: Array) -> Array:
    return array.float() if isinstance(array, Tensor) else array.astype(np.float32)


AS_THEY_ARE = Units()
