"""The two values that every layer of the package shares: a `Batch` of transitions and the `Spec` of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Columns = TypeVar("Columns", bound=tuple)  # a named tuple of tensors, some of them None


class Batch(NamedTuple):
    r"""Transitions `(s, a, r, d, s', a')`, all float32 but for images.

    A target is :math:`r + d \, Q(s', \cdot)`, whatever a transition spans (see `Lookahead`). `discounts` are 0 where
    the task truly ended. That is not the end of a trajectory: a time limit ends a trajectory without ending the task.
    """

    observations: Tensor  # (batch, observation_dim), or uint8 images (batch, frames, height, width, channels)
    actions: Tensor  # (batch, action_dim), in [-1, 1]; several of the environment's, if they are decided in chunks
    rewards: Tensor  # (batch,), the discounted sum over the transition's steps
    discounts: Tensor  # (batch,), of the value of s': gamma to the power of the steps, 0 where the task ended
    next_observations: Tensor  # as observations
    next_actions: Tensor  # as actions: the data's at s'; the last one again where a trajectory ends and none is known
    base_actions: Tensor | None = None  # (batch, action_dim): a cached proposal at s
    next_base_actions: Tensor | None = None  # (batch, action_dim): a cached proposal at s'
    returns: Tensor | None = None  # (batch,): the discounted return that the data earned from s on
    path: Tensor | None = None  # (batch, horizon, observation_dim): the states after each of the chunk's actions


class Drawn(NamedTuple):
    """A batch that is not yet put together: what was drawn, and how to make the batch of it on the data's device."""

    choices: Tensor  # int64
    gather: Callable[[Tensor], Batch]

    def batch(self) -> Batch:
        """The batch itself."""
        return self.gather(self.choices)


class Block(NamedTuple):
    """The batches of several consecutive updates, none of them put together yet."""

    choices: Tensor  # int64, those of the updates along the first axis
    gather: Callable[[Tensor], Batch]  # of one of them

    def one_by_one(self) -> list[Drawn]:
        """The batches of the updates."""
        return [Drawn(choices, self.gather) for choices in self.choices]


class Lookahead(NamedTuple):
    """What one transition of a batch spans, in steps of the environment."""

    discount: float  # gamma, of one step
    steps: int = 1  # of reward before the bootstrap: those of n-step returns, or the chunk's
    horizon: int = 1  # actions decided at once; above 1 it equals `steps`
    path: bool = False  # whether a batch has the states on the way


class Foresight(NamedTuple):
    """The states that a plan expects, after each of its actions, and how much so many steps change in the data."""

    states: Tensor  # (batch, horizon, observation_dim)
    scale: Tensor  # (horizon, observation_dim), standard deviations


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
        """Shape of one observation."""
        return (self.observation_dim,) if self.image is None else tuple(self.image)

    @classmethod
    def of_list(cls, values: Sequence[Any]) -> Spec:
        """What `list(spec)` gave, also after it went through a file; ValueError for what it did not give."""
        observation_dim, action_dim, horizon, image = values
        sizes = (observation_dim, action_dim, horizon, *(() if image is None else image))
        if not all(isinstance(size, int) and size > 0 for size in sizes) or action_dim % horizon:
            raise ValueError(f"no sizes of a task: {values}")
        return cls(observation_dim, action_dim, horizon, None if image is None else cast(Any, tuple(image)))

    def chunked(self, horizon: int) -> Spec:
        """The same task with actions decided `horizon` at a time."""
        return self._replace(action_dim=self.action_dim // self.horizon * horizon, horizon=horizon)
