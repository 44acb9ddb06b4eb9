"""Statistics of the data, by which models of states standardise what they see and predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from deflow.errors import UserError
from deflow.ranges import Positive
from deflow.types import Spec


class StateStatistics(TypedDict):
    """Means and standard deviations in the units that the agent learns from, one number a dimension or one for all.

    Rewards have the centre of their range and half its width instead: where nearly all of them are the same, the few
    others would be many standard deviations away, and their errors all that a batch is about.
    """

    observation_mean: Sequence[float]
    observation_std: Sequence[Positive]
    reward_centre: float
    reward_scale: Positive


class StepStatistics(StateStatistics):
    """Statistics of states, and of what a step changes, `s' - s`."""

    change_mean: Sequence[float]
    change_std: Sequence[Positive]


class PathStatistics(TypedDict):
    """Statistics of what h steps change, `s_{t + h} - s_t`, h = 1 to the horizon: horizon * observation_dim numbers.

    They come one step after the other; a single number stands for all.
    """

    mean: Sequence[float]
    std: Sequence[Positive]


def register_statistics(module: nn.Module, spec: Spec, statistics: Mapping[str, Any], setting: str) -> None:
    """Make each of them a float32 buffer of `module` under its name, of one number a dimension but for the reward's.

    Args:
        module: that standardises.
        spec: sizes of the task.
        statistics: to register.
        setting: that they came from, for the message.

    Raises:
        UserError: for another number of dimensions.
    """
    for name, value in statistics.items():
        numbers = torch.tensor(value, dtype=torch.float32)
        if numbers.ndim and len(numbers) not in (1, spec.observation_dim):
            raise UserError(f"{setting}.{name} needs {spec.observation_dim} numbers, got {len(numbers)}")
        size = () if name.startswith("reward") else (spec.observation_dim,)
        module.register_buffer(name, numbers.expand(size).clone())
