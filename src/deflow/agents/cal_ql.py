"""Cal-QL: conservative values that never fall below what the data's policy earned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.modules.critic import Critic
from deflow.modules.gaussian import GaussianActor
from deflow.ranges import Count, NonNegative, Positive, Seed
from deflow.types import Batch, Metrics, Spec

LARGEST_MULTIPLIER = 1e6


class ConservativeNoise(NamedTuple):
    """Every random number of an update."""

    z: Tensor  # of the actor's loss, shape (batch, action_dim)
    z_target: Tensor  # of the actions at s' in the target, shape (samples, batch, action_dim)
    z_policy: Tensor  # of the policy's actions in the gap, at s and at s', shape (2, samples, batch, action_dim)
    uniform: Tensor  # actions in [-1, 1] of the gap, shape (samples, batch, action_dim)


class GapMultiplier(nn.Module):
    r"""What the gap's weight is multiplied with, so that the gap G comes to its target.

    .. math:: L(\lambda) = -\lambda \, (sg[G] - G_0)

    Args:
        target: :math:`G_0`, in units of reward.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.log_multiplier = nn.Parameter(torch.ones(()))
        self.target = target

    def forward(self) -> Tensor:
        """lambda, a scalar."""
        return self.log_multiplier.exp().clamp(max=LARGEST_MULTIPLIER)

    def loss(self, gap: Tensor) -> tuple[Tensor, Metrics]:
        """It rises while the gap, a scalar, is above its target, and falls while it is below."""
        loss = -self() * (gap.detach() - self.target)
        return loss, {"loss": loss.detach(), "multiplier": self().detach()}


class CalQL(ActorCritic):
    r"""Calibrated Q-learning (arXiv 2303.05479): soft actor-critic with a calibrated conservative critic.

    .. math::
        y &= r + \gamma m \max_{i \le n} \min_k \bar Q_k(s', a'_i), \quad a'_i \sim \pi(s') \\
        \min_\theta &\; E(Q_\theta(s, a) - y)^2 + \beta E[\log \sum_j \exp(\hat Q_\theta(s, a_j) - \log p(a_j))
            - Q_\theta(s, a)] \\
        \max_\phi &\; E[\min_k Q_k(s, a_\pi) - \alpha \log \pi(a_\pi \mid s)]

    The :math:`a_j` are n uniform actions, n of the policy at s and n of the policy at s'; :math:`p` is the density each
    was drawn with, and :math:`\hat Q = \max(Q, G(s))` for those of the policy: where their value is below the return
    :math:`G` that the data earned from s, it is pushed down no further. With a target for the gap, its weight is
    :math:`\lambda \beta` with a learned :math:`\lambda`, see `GapMultiplier`. It acts with the policy's mode and
    explores with actions drawn from it.

    Differences from the released code:
    1. The losses of the members are averaged, the gap's as well (there summed).
    2. Kernels are drawn by Xavier's uniform distribution (there orthogonal, the critics' last ones 100 times
       smaller), and the logarithm of the deviation is what the network says (there scaled and shifted by two learned
       numbers, and begins at -1).
    3. Targets move toward the weights before the step (there after it).
    4. The return of a cut trajectory goes on with its last cost, whatever its costs were (there only if all of them are
       the cost of a step of the task).

    Args:
        spec: sizes of the task.
        critic: makes the Critic.
        actor: makes the GaussianActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        conservatism: beta, weight of the gap, >= 0 (there `cql_min_q_weight`).
        samples: n, actions of each kind, at least 1.
        max_backup: take the best of n actions at s' in the target; otherwise one is drawn.
        target_gap: to which a learned multiplier of `conservatism` brings the gap, > 0 in units of reward; None: there
            is none (there `cql_lagrange`).
    """

    actor: GaussianActor
    multiplier: GapMultiplier
    traits = Traits(reads_returns=True, trains_jointly=True, takes_lowest=True)

    def __init__(
        self,
        spec: Spec,
        critic: Callable[[Spec], Critic],
        actor: Callable[[Spec], GaussianActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        conservatism: NonNegative = 5.0,
        samples: Count = 10,
        max_backup: bool = True,
        target_gap: Positive | None = None,
    ) -> None:
        parts: dict[str, nn.Module] = {"critic": critic(spec), "actor": actor(spec)}
        if target_gap is not None:
            parts["multiplier"] = GapMultiplier(target_gap)
        super().__init__(spec, parts, optimizer, seed)
        self.require_ensemble()
        self.conservatism, self.samples, self.max_backup = conservatism, samples, max_backup

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> ConservativeNoise:
        shape, device = batch.actions.shape, batch.actions.device
        in_target = self.samples if self.max_backup else 1
        normal = torch.randn(1 + in_target + 2 * self.samples, *shape, generator=generator, device=device)
        z, z_target, z_policy = normal.split([1, in_target, 2 * self.samples])
        uniform = torch.rand(self.samples, *shape, generator=generator, device=device) * 2 - 1
        return ConservativeNoise(z[0], z_target, z_policy.unflatten(0, (2, self.samples)), uniform)

    def losses(self, batch: Batch, noise: ConservativeNoise) -> Iterator[Loss]:
        gap = self._gap(batch, noise) if self.trains("critic") or self.trains("multiplier") else None

        # Critic: temporal difference toward the policy at s', and the calibrated conservative gap.
        if self.trains("critic") and gap is not None:
            loss, metrics = self.critic.loss_from(batch, self._next_value(batch, noise.z_target))
            loss = loss + self._weight() * gap
            yield "critic", loss, metrics | {"gap": gap.detach(), "loss": loss.detach()}

        # Multiplier: brings the gap to its target.
        if self.trains("multiplier") and gap is not None:
            yield "multiplier", *self.multiplier.loss(gap)

        # Actor: pathwise through the smaller Q, with entropy.
        if self.trains("actor"):
            yield "actor", *self.actor.loss(batch.observations, noise.z, self._smaller_value)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.mode(observations)

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.sample(observations, z)[0]

    def panels(self) -> list[Panel]:
        gap = {"train/critic/gap": "other actions' values above the data's"}
        soft = {"train/actor/entropy": "entropy", "train/actor/temperature": "temperature"}
        losses = [loss_panel("critic", log=True), loss_panel("actor")]
        panels = [*losses, value_panel("actor"), Panel("conservative gap", gap), Panel("exploration", soft)]
        multiplier = Panel("multiplier", {"train/multiplier/multiplier": "of the gap's weight"}, log=True)
        return [*panels, multiplier] if "multiplier" in self.parts else panels

    def _weight(self) -> Tensor | float:
        """The multiplier of the gap, without gradient."""
        return self.conservatism * (self.multiplier().detach() if "multiplier" in self.parts else 1.0)

    @torch.no_grad()
    def _next_value(self, batch: Batch, z: Tensor) -> Tensor:
        """The target's value of s', shape (batch,)."""
        actions, _ = self._sample(batch.next_observations, z)
        return _on_each(self.critic.target_values, batch.next_observations, actions).amin(0).amax(0)

    def _gap(self, batch: Batch, noise: ConservativeNoise) -> Tensor:
        """How far the values of other actions lie above those of the data's, a scalar."""
        assert batch.returns is not None
        with torch.no_grad():
            here, log_here = self._sample(batch.observations, noise.z_policy[0])
            there, log_there = self._sample(batch.next_observations, noise.z_policy[1])
        values = _on_each(self.critic.values, batch.observations, torch.cat([noise.uniform, here, there]))
        of_uniform, of_policy = values.split([self.samples, 2 * self.samples], dim=1)
        of_policy = of_policy.maximum(batch.returns)
        log_uniform = -self.spec.action_dim * math.log(2.0)
        logits = torch.cat([of_uniform - log_uniform, of_policy - torch.cat([log_here, log_there])], dim=1)
        return (logits.logsumexp(1) - self.critic.values(batch.observations, batch.actions)).mean()

    def _sample(self, observations: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's actions, shape (samples, batch, action_dim), and their log densities, (samples, batch)."""
        actions, log_probabilities = self.actor.sample(observations, z.transpose(0, 1).flatten(0, 1))
        grid = z.shape[1::-1]  # (batch, samples)
        return actions.unflatten(0, grid).transpose(0, 1), log_probabilities.unflatten(0, grid).transpose(0, 1)

    def _smaller_value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic.frozen_values(observations, actions).amin(0, keepdim=True)


def _on_each(value: Callable[[Tensor, Tensor], Tensor], observations: Tensor, actions: Tensor) -> Tensor:
    """Values of several actions a state, (samples, batch, action_dim) -> (members, samples, batch), in one batch."""
    samples, batch, _ = actions.shape
    values = value(observations, actions.transpose(0, 1).flatten(0, 1))
    return values.unflatten(1, (batch, samples)).transpose(1, 2)
