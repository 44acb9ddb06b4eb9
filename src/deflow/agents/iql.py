"""IQL: implicit Q-learning, and a Gaussian that is drawn toward the better actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss
from deflow.agents.bc import ImitationNoise
from deflow.agents.implicit import ImplicitQ
from deflow.agents.panels import Panel, loss_panel
from deflow.modules.critic import Critic, advantage_weights, value_scale
from deflow.modules.gaussian_policy import GaussianPolicy
from deflow.modules.value import Value
from deflow.ranges import Activation, NonNegative, Positive, Rate, ReadIf, Seed, Widths
from deflow.types import Batch, Metrics, Spec

Extraction = Literal["awr", "ddpgbc"]
Advantage = Literal["online", "target"]


class IQLActor(GaussianPolicy):
    r"""A Gaussian that learns from the values of the data's actions (`awr`), or climbs them (`ddpgbc`).

    .. math::
        L_{awr}(\phi) &= -E\,w \log \pi_\phi(a \mid s), \quad w = \min(\exp(\alpha A(s, a)), 100) \\
        L_{ddpgbc}(\phi) &= -E\,Q(s, clip(\mu_\phi(s))) / sg[E|Q|] - \alpha E \log \pi_\phi(a \mid s), \quad
            Q = \min_k Q_k

    Args:
        spec: sizes of the task.
        hidden, activation, encoder, std, squash, dropout, output_scale: see `GaussianPolicy`.
        extraction: `awr`, advantage-weighted regression, or `ddpgbc`.
        alpha: inverse temperature of `awr` in 1 / units of reward, weight of the imitation in `ddpgbc`, >= 0; the
            papers tune it for each task.
        advantage: of `awr`, by the `online` critics or by the `target` ones.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        std: Positive | None = 1.0,
        squash: bool = False,
        dropout: Rate = 0.0,
        output_scale: Positive = 0.01,
        extraction: Extraction = "awr",
        alpha: NonNegative = 10.0,
        advantage: Annotated[Advantage, ReadIf("extraction", "awr")] = "online",
    ) -> None:
        super().__init__(spec, hidden, activation, encoder, std, squash, dropout, output_scale)
        self.extraction: Extraction = extraction
        self.alpha = alpha
        self.advantage: Advantage = advantage

    def awr_loss(self, batch: Batch, advantages: Tensor, keep: Tensor | None) -> tuple[Tensor, Metrics]:
        """Imitate the data's actions, those of higher `advantages` (shape (batch,), without gradient) more."""
        weights = advantage_weights(advantages, self.alpha)
        loss, metrics = self.loss(batch.observations, batch.actions, keep, weights)
        return loss, metrics | {"advantage": advantages.mean(), "weight": weights.mean()}

    def ddpgbc_loss(
        self, batch: Batch, values: Callable[[Tensor, Tensor], Tensor], keep: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """Climb `values(s, a)`, of shape (members, batch) with a gradient into `a` only, near the data's actions."""
        mean = self.mean(batch.observations, keep)
        imitation = -self.log_probabilities(mean, batch.actions).mean()
        q = values(batch.observations, mean.clamp(-1.0, 1.0)).amin(0)
        loss = self.alpha * imitation - q.mean() / value_scale(q)
        return loss, {"loss": loss.detach(), "imitation": imitation.detach(), "q": q.detach().mean()}


class IQL(ImplicitQ):
    r"""Implicit Q-learning (arXiv 2110.06169).

    .. math::
        \min_\eta &\; E\,L^2_\kappa(\min_k \bar Q_k(s, a) - V_\eta(s)) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m V_\eta(s'))^2 \\
        \min_\phi &\; -E\,\min(\exp(\alpha(\min_k Q_k(s, a) - V_\eta(s))), 100) \log \pi_\phi(a \mid s)

    or another loss of the policy, see `IQLActor`. It acts with the mean and explores with actions drawn around it.

    Differences from the code behind the tables (FQL's, arXiv 2502.02538): with a learned deviation `ddpgbc` climbs the
    value of the mean (there of a sample). In IQL's own code and CORL's, whose D4RL cells the tables copy, the advantage
    is that of the target critics: `agent.actor.advantage=target`.

    Args:
        spec: sizes of the task.
        critic: makes the Critic.
        value: makes the Value.
        actor: makes the IQLActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
    """

    actor: IQLActor
    headline = MappingProxyType({"critic": "critic/loss", "v": "value/v", "policy": "actor/loss"})

    def __init__(
        self,
        spec: Spec,
        critic: Callable[[Spec], Critic],
        value: Callable[[Spec], Value],
        actor: Callable[[Spec], IQLActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
    ) -> None:
        super().__init__(spec, {"critic": critic(spec), "value": value(spec), "actor": actor(spec)}, optimizer, seed)
        self.require_ensemble()

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> ImitationNoise:
        return ImitationNoise(self.actor.net.dropout.draw(len(batch.actions), generator))

    def losses(self, batch: Batch, noise: ImitationNoise) -> Iterator[Loss]:
        # Critic and value: from the data's actions alone.
        yield from self.value_losses(batch)

        # Policy: from the values of the data's actions, or pathwise through them.
        if self.trains("actor") and self.actor.extraction == "awr":
            with torch.no_grad():
                values = {"online": self.critic.values, "target": self.critic.target_values}[self.actor.advantage]
                q = values(batch.observations, batch.actions).amin(0)
                advantages = q - self.value(batch.observations)
            yield "actor", *self.actor.awr_loss(batch, advantages, noise.keep)
        elif self.trains("actor"):
            yield "actor", *self.actor.ddpgbc_loss(batch, self.critic.frozen_values, noise.keep)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.mode(observations)

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.sample(observations, z)

    def panels(self) -> list[Panel]:
        found = {"awr": {"train/actor/weight": "mean"}, "ddpgbc": {"train/actor/q": "Q(s, policy)"}}
        title = {"awr": "advantage weight", "ddpgbc": "value of the policy"}
        of_policy = Panel(title[self.actor.extraction], found[self.actor.extraction])
        return [loss_panel("actor"), of_policy, *self.value_panels()]
