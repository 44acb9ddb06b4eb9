"""The two values that every layer of the package shares: a `Batch` of transitions and the `Spec` of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Columns = TypeVar("Columns", bound=tuple)  # a named tuple of tensors, some of them None


class Batch(NamedTuple):
    """Transitions `(s, a, r, m, s')`, all float32 but for images.

    `masks` says whether to bootstrap: 0 where the task truly ended. It is not the end of a trajectory
    (a time limit ends a trajectory without ending the task), which a one-step update never needs.
    """

    observations: Tensor  # (batch, observation_dim), or uint8 images (batch, frames, height, width, channels)
    actions: Tensor  # (batch, action_dim), in [-1, 1]; several of the environment's, if they are decided in chunks
    rewards: Tensor  # (batch,)
    masks: Tensor  # (batch,), 0 or 1; with several steps of reward, 0 or a power of the discount
    next_observations: Tensor  # as observations
    base_actions: Tensor | None = None  # (batch, action_dim): a cached proposal at s
    next_base_actions: Tensor | None = None  # (batch, action_dim): a cached proposal at s'
    returns: Tensor | None = None  # (batch,): the discounted return that the data earned from s on


def stack(several: Sequence[Columns]) -> Columns:
    """Named tuples of tensors as one, stacked along a new first axis."""
    columns = zip(*several, strict=True)
    return cast(Any, type(several[0]))(*(None if column[0] is None else torch.stack(column) for column in columns))


class Spec(NamedTuple):
    """Sizes of a task's observations and actions: all that networks need to know of it.

    With action chunks an action of the policy is `horizon` of the environment's, one after the other.
    """

    observation_dim: int  # numbers in an observation
    action_dim: int  # of the whole chunk
    horizon: int = 1  # actions decided at once and executed without looking
    image: tuple[int, int, int, int] | None = None  # frames, height, width and channels, if images are observed

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of one observation."""
        return (self.observation_dim,) if self.image is None else tuple(self.image)

    @classmethod
    def of_list(cls, values: Sequence[Any]) -> Spec:
        """What `list(spec)` gave, also after it went through a file."""
        spec = cls(*values)
        return spec._replace(image=None if spec.image is None else cast(Any, tuple(spec.image)))

    def chunked(self, horizon: int) -> Spec:
        """The same task with actions decided `horizon` at a time."""
        return self._replace(action_dim=self.action_dim // self.horizon * horizon, horizon=horizon)
