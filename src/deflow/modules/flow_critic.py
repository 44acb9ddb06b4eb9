"""FlowCritic: action values as the end points of a flow over returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.func import functional_call

from deflow.errors import UserError
from deflow.modules.critic import Aggregate
from deflow.nets.encoder import beside, make_encoder
from deflow.nets.mlp import EnsembleMLP
from deflow.ranges import Activation, Count, Interval, Share, Widths
from deflow.types import Batch, Metrics, Spec

BINS = 51  # of the encoding of a point on the flow
TIME_FEATURES = 16


class FlowCritic(LightningModule):
    r"""A velocity field over returns whose flow carries noise to the value; a network distilled from it for the policy.

    .. math::
        L(\theta) &= E \, \tfrac1K \sum_k (v_k(t, z_t \mid s, a) - (y - z_0))^2, \quad z_t = (1 - t) z_0 + t y \\
        y &= r + d \, \mathrm{agg}_k \bar\psi_k(1, z_0' \mid s', a') \\
        L(q) &= E (q(s, a) - \mathrm{mean}_k \bar\psi_k(1, z_0 \mid s, a))^2

    :math:`\bar\psi_k(1, z_0)` is the end of the target field's flow from :math:`z_0 \sim U`; the distilled :math:`q`
    learns it at :math:`(s, a)` and at :math:`(s', a')`. Flows are computed in Euler
    steps and in units of the value range; a point on the flow is encoded as a smooth histogram and the time by cosines,
    without which the field is too smooth to make use of its steps.
    Source: floq (arXiv 2509.06863). Takes the place of `Critic` in any agent.

    Args:
        spec: sizes of the task.
        value_range: lowest and highest value possible, in units of reward.
        hidden: widths of the hidden layers, of the field and of the distilled network.
        activation: `gelu` (exact) or `gelu_tanh`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        members: size of the ensemble.
        aggregate: `mean` or `min` over the ensemble, in the target only.
        tau: share of the online weights that the targets take whenever they move, in (0, 1].
        steps: Euler steps, at least 1.
        noise_width: width of the interval in which the flow starts, centred, as a share of the range, in (0, 1].

    Raises:
        UserError: if the lowest value is not below the highest.
    """

    bin_edges: Tensor
    frequencies: Tensor

    def __init__(
        self,
        spec: Spec,
        value_range: Interval,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        members: Count = 2,
        aggregate: Aggregate = "mean",
        tau: Share = 0.005,
        steps: Count = 8,
        noise_width: Share = 0.25,
    ) -> None:
        super().__init__()
        if not value_range[0] < value_range[1]:
            raise UserError(f"agent.critic.value_range must be [lowest, highest], got {list(value_range)}")
        more = spec.action_dim + BINS + TIME_FEATURES
        self.online = EnsembleMLP(members, make_encoder(spec, activation, encoder), more, hidden, 1, activation)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.distilled = EnsembleMLP(1, make_encoder(spec, activation, encoder), spec.action_dim, hidden, 1, activation)
        self.low, self.scale = float(value_range[0]), float(value_range[1] - value_range[0])
        self.aggregate: Aggregate = aggregate
        self.tau = tau
        self.steps, self.noise_width = steps, noise_width
        # One bin outside the range at either end, so that a point that overshoots still has a code of its own.
        self.register_buffer("bin_edges", torch.linspace(-1 / BINS, 1 + 1 / BINS, BINS + 1), persistent=False)
        self.register_buffer("frequencies", math.pi * torch.arange(TIME_FEATURES), persistent=False)

    def loss(self, batch: Batch, next_actions: Tensor, levels: Tensor) -> tuple[Tensor, Metrics]:
        """Flow matching toward the temporal-difference target, and the distillation.

        Args:
            batch: transitions.
            next_actions: the policy's actions at `s'`, shape (batch, action_dim); no gradient flows into them.
            levels: uniform in [0, 1), shape (batch, 4): the time, and where the flows start.
        """
        with torch.no_grad():
            next_values = self._flow(batch.next_observations, next_actions, levels[:, 3])
            next_value = next_values.mean(0) if self.aggregate == "mean" else next_values.amin(0)
        loss, metrics = self.loss_from(batch, next_value, levels)
        distillation = self._distillation(batch.next_observations, next_actions, next_values)
        metrics |= {"loss": metrics["loss"] + distillation.detach(), "next_distillation": distillation.detach()}
        return loss + distillation, metrics

    def loss_from(self, batch: Batch, next_value: Tensor, levels: Tensor) -> tuple[Tensor, Metrics]:
        """As `loss`, toward a value of `s'` from elsewhere, without gradient, shape (batch,)."""
        times, starts = levels[:, 0], self._starts(levels[:, 1])
        target = self._unit(batch.rewards + batch.discounts * next_value)
        z_t = starts + times * (target - starts)
        features = self.online.encoder(batch.observations)
        velocity = self._velocity(self.online, features, batch.actions, z_t, times)
        matching = (velocity - (target - starts)).square().mean()

        with torch.no_grad():
            values = self._flow(batch.observations, batch.actions, levels[:, 2])
        distillation = self._distillation(batch.observations, batch.actions, values)
        loss = matching + distillation
        return loss, {
            "loss": loss.detach(),
            "matching": matching.detach(),
            "distillation": distillation.detach(),
            "q_mean": values.mean(),
            "q_min": values.amin(),
            "q_max": values.amax(),
        }

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Distilled action values, shape (1, batch)."""
        return self._values_of(self.distilled(observations, actions).squeeze(-1))

    def target_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Values of every member's target field, from the middle of the starting interval, shape (members, batch)."""
        return self._flow(observations, actions, torch.full_like(actions[:, 0], 0.5))

    def frozen_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """As `values`, with a gradient into the actions but none into the critic's own parameters."""
        frozen = {name: parameter.detach() for name, parameter in self.distilled.named_parameters()}
        return self._values_of(functional_call(self.distilled, frozen, (observations, actions)).squeeze(-1))

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, target, tau)` for the agent's Polyak step."""
        for online, target in zip(self.online.parameters(), self.target.parameters(), strict=True):
            yield online, target, self.tau

    def _distillation(self, observations: Tensor, actions: Tensor, values: Tensor) -> Tensor:
        """Squared error of the distilled network against the members' mean, in units of the range."""
        distilled = self.distilled(observations, actions).squeeze(-1)
        return (distilled - self._unit(values.mean(0))).square().mean()

    def _flow(self, observations: Tensor, actions: Tensor, levels: Tensor) -> Tensor:
        """End points of the target fields' flows, in units of reward, shape (members, batch)."""
        z = self._starts(levels).expand(self.target.members, -1)
        features = self.target.encoder(observations)
        for step in range(self.steps):
            times = torch.full_like(levels, step / self.steps)
            z = z + self._velocity(self.target, features, actions, z, times) / self.steps
        return self._values_of(z)

    def _velocity(self, field: EnsembleMLP, features: Tensor, actions: Tensor, z_t: Tensor, times: Tensor) -> Tensor:
        """Velocities, shape (members, batch); `z_t` is of that shape or (batch,), `times` (batch,)."""
        z_t = z_t.expand(field.members, -1)
        cumulative = torch.special.ndtr((self.bin_edges - z_t[..., None]) * BINS)  # a bin is one standard deviation
        waves = torch.cos(times[:, None] * self.frequencies)
        shared = beside(features, actions, waves).expand(field.members, -1, -1)
        return field.head(torch.cat([shared, cumulative.diff(dim=-1)], dim=-1)).squeeze(-1)

    def _starts(self, levels: Tensor) -> Tensor:
        """Starting points from uniform numbers in [0, 1)."""
        return 0.5 + self.noise_width * (levels - 0.5)

    def _unit(self, values: Tensor) -> Tensor:
        """Values in units of the range: 0 is the lowest, 1 the highest."""
        return (values - self.low) / self.scale

    def _values_of(self, unit: Tensor) -> Tensor:
        return self.low + self.scale * unit
