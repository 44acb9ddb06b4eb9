"""Imagination: what a policy would do and earn in a model of the environment's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deflow.modules.transition_flow import TransitionModel


class Decision(NamedTuple):
    """A policy's action in a state, and how far that is from what it may do."""

    actions: Tensor  # (batch, action_dim), in [-1, 1]
    deviations: Tensor  # (batch, action_dim), from the proposal: what a policy is held to


class Imagined(NamedTuple):
    """Steps of a policy in the model, each number of shape (batch, ...)."""

    rewards: Tensor  # (batch,), the discounted sum of them
    discounts: Tensor  # (batch,), of the value of where they end: 0 where the task ended on the way
    observations: Tensor  # (batch, observation_dim), where they end
    actions: Tensor  # (batch, action_dim), the policy's there
    deviations: Tensor  # (steps, batch, action_dim), of the decisions after each step
    counts: Tensor  # (steps, batch), whether they do: 1, or 0 where the task had ended by then

    def value(self, last: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Rewards of the steps and the value `last` of where they end, shape (batch,)."""
        return self.rewards + self.discounts * last(self.observations, self.actions)

    def from_first(self, deviations: Tensor) -> tuple[Tensor, Tensor]:
        """`deviations` and `counts` with those of the first actions before them, of which all count.

        Args:
            deviations: of the first actions, shape (batch, action_dim).
        """
        all_count = torch.ones_like(self.counts[:1])
        return torch.cat([deviations[None], self.deviations]), torch.cat([all_count, self.counts])


class Imagination(NamedTuple):
    """A model, and the random numbers of so many steps in it.

    Args:
        model: of the environment's steps; no gradient reaches its parameters.
        z: the policy's noise after each step, shape (batch, steps, action_dim).
        outcomes: the model's noise, shape (batch, steps, outcome_dim).
        forgetful: whether a step that has a gradient is computed anew by the backward pass, so that memory does not
            grow by what the networks compute, only by the states; `vmap` cannot do so.
    """

    model: TransitionModel
    z: Tensor
    outcomes: Tensor
    forgetful: bool = True

    def unroll(self, observations: Tensor, actions: Tensor, decide: Callable[[Tensor, Tensor], Decision]) -> Imagined:
        """Take these actions, then the policy's, with a gradient through all of it if one is asked for.

        Whether the task goes on has no gradient. Where it has ended the state stays: a model asked for more of it goes
        where no data are, and numbers that overflow there would reach the sums even with a weight of 0.

        Args:
            observations: where it begins, shape (batch, observation_dim).
            actions: the first, shape (batch, action_dim).
            decide: the policy, of states and `z`.
        """

        def step(observations: Tensor, actions: Tensor, z: Tensor, noise: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
            after, rewards, goes_on = self.model.imagine(observations, actions, noise)
            after = torch.where(counts[:, None] > 0, after, observations)
            return after, rewards, goes_on, *decide(after, z)

        rewards, discounts = torch.zeros_like(actions[:, 0]), torch.ones_like(actions[:, 0])
        deviations, counts = [], [torch.ones_like(rewards)]
        for z, noise in zip(self.z.unbind(1), self.outcomes.unbind(1), strict=True):
            arguments = observations, actions, z, noise, counts[-1]
            if self.forgetful and torch.is_grad_enabled():
                taken: Any = checkpoint(step, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                taken = step(*arguments)
            observations, earned, goes_on, actions, deviation = taken
            rewards = rewards + discounts * earned
            discounts = self.model.discount * discounts * goes_on
            deviations.append(deviation)
            counts.append(counts[-1] * goes_on)
        return Imagined(rewards, discounts, observations, actions, torch.stack(deviations), torch.stack(counts[1:]))


def mean_that_counts(values: Tensor, counts: Tensor) -> Tensor:
    """The mean over the batch of those values that count, shape (..., batch, n) -> (..., n); 0 where none does.

    Args:
        values: of any kind.
        counts: 1 or 0, shape (..., batch).
    """
    return (counts[..., None] * values).sum(-2) / counts.sum(-1, keepdim=True).clamp(min=1.0)
