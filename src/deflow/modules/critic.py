"""Critic: an ensemble of action values with a slowly moving copy of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from torch.func import grad

from deflow.distributed import mean_over_ranks
from deflow.errors import UserError
from deflow.nets.average import polyak_pairs
from deflow.nets.encoder import make_encoder
from deflow.nets.frozen import frozen_call
from deflow.nets.mlp import EnsembleMLP
from deflow.ranges import Activation, Count, NonNegative, Norm, Reduction, Share, Widths
from deflow.types import Batch, Metrics, Spec

Aggregate = Literal["mean", "min"]

# Advantage weights are cut here, as in AWAC's and IQL's released code.
MAX_WEIGHT = 100.0


def value_scale(q: Tensor) -> Tensor:
    """Mean absolute value over the whole batch (of all ranks), without gradient: what normalised losses divide by."""
    return mean_over_ranks(q.detach().abs().mean())


def value_gradient(
    value: Callable[[Tensor, Tensor], Tensor], observations: Tensor, actions: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of `value(s, a)`, shape (batch,), by the actions, shape (batch, action_dim); and the value.

    Both are without gradient.
    """

    def total(actions: Tensor) -> tuple[Tensor, Tensor]:
        q = value(observations, actions)
        return q.sum(), q

    uphill, q = grad(total, has_aux=True)(actions)
    return uphill.detach(), q.detach()


def advantage_weights(advantages: Tensor, beta: float) -> Tensor:
    r""":math:`\min(\exp(\beta A), 100)`, as in AWAC (arXiv 2006.09359); `beta` is an inverse temperature."""
    return (beta * advantages).exp().clamp(max=MAX_WEIGHT)


class Critic(LightningModule):
    r"""Action values :math:`Q_k(s, a)` with targets :math:`\bar Q_k` that follow by Polyak averaging.

    .. math:: L(\theta) = E \, \mathrm{red}_k (Q_k(s, a) - y)^2, \quad
              y = r + d \, \mathrm{agg}_k \bar Q_k(s', a')

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        members: size of the ensemble.
        aggregate: `mean` or `min` over the ensemble, in the target only.
        tau: share of the online weights that the targets take whenever they move, in (0, 1].
        rho: standard deviations of the ensemble (of the population) by which the mean is lowered, >= 0.
        norm: what is layer-normalised, see `EnsembleMLP`.
        reduction: `mean` or `sum` of the members' losses.

    Raises:
        UserError: if there is no mean that `rho` could lower.
    """

    levels, next_draws = 0, 1  # uniform numbers, and actions at s', that a critic that is a flow takes for a transition

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        members: Count = 2,
        aggregate: Aggregate = "mean",
        tau: Share = 0.005,
        rho: NonNegative = 0.0,
        norm: Norm = "hidden",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if rho > 0 and aggregate == "min":
            raise UserError(f"agent.critic.rho={rho} lowers the mean: set agent.critic.aggregate=mean")
        of_observation = make_encoder(spec, activation, encoder)
        self.online = EnsembleMLP(members, of_observation, spec.action_dim, hidden, 1, activation, norm)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.aggregate: Aggregate = aggregate
        self.tau, self.rho = tau, rho
        self._of_members = float(members) if reduction == "sum" else 1.0

    def loss(self, batch: Batch, next_actions: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The temporal-difference loss.

        Args:
            batch: transitions.
            next_actions: the policy's actions at `s'`, shape (batch, action_dim); no gradient flows into them.
            levels: not read; the random numbers of a critic that is a flow.
        """
        with torch.no_grad():
            next_values = self.target_values(batch.next_observations, next_actions)
        return self.loss_from(batch, self.aggregated(next_values))

    def aggregated(self, values: Tensor) -> Tensor:
        """What the target takes of an ensemble's values, shape (members, ...) -> (...)."""
        return values.amin(0) if self.aggregate == "min" else self.lowered_mean(values)

    def lowered_mean(self, values: Tensor) -> Tensor:
        """The mean of an ensemble's values less `rho` standard deviations, shape (members, ...) -> (...)."""
        if self.rho == 0:
            return values.mean(0)
        variance = values.var(0, correction=0).clamp(min=torch.finfo(values.dtype).tiny)  # a root at 0 has no gradient
        return values.mean(0) - self.rho * variance.sqrt()

    def loss_from(self, batch: Batch, next_value: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The temporal-difference loss toward a value of `s'` from elsewhere, without gradient, shape (batch,)."""
        return self.loss_to(batch, batch.rewards + batch.discounts * next_value)

    def loss_to(self, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
        """The squared error of the members' values of (s, a), toward a target without gradient, shape (batch,)."""
        values = self._values(self.online, batch.observations, batch.actions)
        loss = self._of_members * (values - target).square().mean()
        q = values.detach()
        return loss, {"loss": loss.detach(), "q_mean": q.mean(), "q_min": q.amin(), "q_max": q.amax()}

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Action values of every member, shape (members, batch); there may be several actions for a state."""
        return self._values(self.online, observations, actions)

    def target_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The target networks' values; otherwise as `values`."""
        return self._values(self.target, observations, actions)

    def frozen_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """As `values`, with a gradient into states and actions but none into the critic's own parameters."""
        return frozen_call(self.online, observations, actions).squeeze(-1)

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, target, tau)` for the agent's Polyak step."""
        return polyak_pairs(self.online, self.target, self.tau)

    @staticmethod
    def _values(network: EnsembleMLP, observations: Tensor, actions: Tensor) -> Tensor:
        return network(observations, actions).squeeze(-1)
