"""ReBRAC: TD3 that is held near the data's actions, in the policy and in the values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.modules.critic import Critic, value_scale
from deflow.nets.average import polyak_pairs
from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Count, NonNegative, Positive, Seed, Share, Widths
from deflow.types import Batch, Spec

OUTPUT_SCALE = 0.01  # of the last layer's variance at the start


class SmoothingNoise(NamedTuple):
    """Every random number of an update."""

    z_next: Tensor  # of the target policy's actions at s', shape (batch, action_dim)


class TanhActor(LightningModule):
    r"""Deterministic policy :math:`\pi(s) = \tanh \mu(s)` with a slowly moving copy of itself.

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        tau: share of the online weights that the target takes whenever it moves, in (0, 1].
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        tau: Share = 0.005,
    ) -> None:
        super().__init__()
        self.online = MLP(make_encoder(spec, activation, encoder), 0, hidden, spec.action_dim, activation)
        self.online.scale_output(OUTPUT_SCALE)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.tau = tau

    def forward(self, observations: Tensor) -> Tensor:
        """Actions in (-1, 1), shape (batch, action_dim)."""
        return self.online(observations).tanh()

    def target_actions(self, observations: Tensor) -> Tensor:
        """The target network's actions; otherwise as `forward`."""
        return self.target(observations).tanh()

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, target, tau)` for the agent's Polyak step."""
        return polyak_pairs(self.online, self.target, self.tau)


class ReBRAC(ActorCritic):
    r"""ReBRAC (arXiv 2305.09836): behaviour-regularised TD3 with a delayed policy.

    .. math::
        a' &= clip(\bar\pi(s') + clip(\sigma z, -c, c)) \\
        \min_\theta &\; E(Q_\theta(s, a) - y)^2, \quad
            y = r + \gamma m (\min_k \bar Q_k(s', a') - \beta_Q \|a' - a'_{data}\|^2) \\
        \min_\phi &\; \beta_\pi E\|\pi_\phi(s) - a\|^2 - E[\min_k Q_k(s, \pi_\phi(s))] / sg[E|\min_k Q_k|]

    The policy trains in every second update, and all targets move with it. Norms are sums over the action's dimensions.

    Differences from the code behind the tables:
    1. FQL's (arXiv 2502.02538): the data's next action at a trajectory's end is the last one again (there the next
       trajectory's first).
    2. CORL's, behind the cells of D4RL: kernels and biases begin as in FQL's (there hidden biases at 0.1 and last
       layers within 1e-3, the policy's, and 3e-3, the critic's), the losses of the members are averaged (there summed),
       the policy climbs the critic of before its step (there of after it) and trains in the second update of each two
       (there in the first).

    Args:
        spec: sizes of the task.
        critic: makes the Critic.
        actor: makes the TanhActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        actor_weight: :math:`\beta_\pi`, >= 0; the papers tune it for each task.
        critic_weight: :math:`\beta_Q` in units of reward, >= 0; the papers tune it for each task.
        noise: sigma, standard deviation of what smooths the target's and explores with the policy's actions, >= 0.
        noise_clip: c, the largest of it, > 0.
        every: rhythm of the parts.
        drift: in an update without the policy Adam's momentum moves it, as in the code behind the tables; otherwise its
            optimizer rests, as in ReBRAC's own.
    """

    actor: TanhActor
    traits = Traits(trains_jointly=True, takes_lowest=True)
    headline = MappingProxyType({"critic": "critic/loss", "q": "actor/q", "distance": "actor/distance"})

    def __init__(
        self,
        spec: Spec,
        critic: Callable[[Spec], Critic],
        actor: Callable[[Spec], TanhActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        actor_weight: NonNegative = 0.01,
        critic_weight: NonNegative = 0.01,
        noise: NonNegative = 0.2,
        noise_clip: Positive = 0.5,
        every: Mapping[str, Count] = MappingProxyType({"actor": 2}),
        drift: bool = True,
    ) -> None:
        super().__init__(spec, {"critic": critic(spec), "actor": actor(spec)}, optimizer, seed, every)
        self.require_ensemble()
        self.actor_weight, self.critic_weight = actor_weight, critic_weight
        self.smoothing, self.noise_clip = noise, noise_clip
        self.drifts = drift

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> SmoothingNoise:
        actions = batch.actions
        return SmoothingNoise(torch.randn(actions.shape, generator=generator, device=actions.device))

    def losses(self, batch: Batch, noise: SmoothingNoise) -> Iterator[Loss]:
        # Critic: the smaller target value, less what the policy's next action is away from the data's.
        if self.trains("critic"):
            with torch.no_grad():
                next_actions = self._noisy(self.actor.target_actions(batch.next_observations), noise.z_next)
                distance = (next_actions - batch.next_actions).square().sum(-1)
                next_value = self.critic.target_values(batch.next_observations, next_actions).amin(0)
            yield "critic", *self.critic.loss_from(batch, next_value - self.critic_weight * distance)

        # Actor: pathwise through the smaller value, near the data's action.
        if self.trains("actor"):
            actions = self.actor(batch.observations)
            q = self.critic.frozen_values(batch.observations, actions).amin(0)
            distance = (actions - batch.actions).square().sum(-1).mean()
            loss = self.actor_weight * distance - q.mean() / value_scale(q)
            yield "actor", loss, {"loss": loss.detach(), "q": q.detach().mean(), "distance": distance.detach()}

    def moves_targets(self, part: str) -> bool:
        return self.trains("actor")

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor(observations)

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        return self._noisy(self.actor(observations), z)

    def panels(self) -> list[Panel]:
        distance = {"train/actor/distance": "squared distance from the data's action"}
        losses = [loss_panel("critic", log=True), loss_panel("actor")]
        return [*losses, value_panel("actor"), Panel("behaviour regularisation", distance, log=True)]

    def _noisy(self, actions: Tensor, z: Tensor) -> Tensor:
        return (actions + (self.smoothing * z).clamp(-self.noise_clip, self.noise_clip)).clamp(-1.0, 1.0)
