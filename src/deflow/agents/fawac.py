"""FAWAC: flow matching in which better actions weigh more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic
from deflow.agents.base import Loss, Traits
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import Critic, advantage_weights
from deflow.ranges import Positive, Seed
from deflow.types import Batch, Spec


class FAWAC(ActorCritic):
    r"""Flow advantage-weighted actor-critic, as a baseline of FQL (arXiv 2502.02538); AWAC: arXiv 2006.09359.

    .. math::
        \min_\psi &\; E\,w\,\|v_\psi(s, x_t, t) - (a - x_0)\|^2, \quad
        w = \min(\exp(\beta (\bar Q(s, a) - \bar Q(s, \mu_\psi(s, z)))), 100) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m \bar Q(s', \mu_\psi(s', z')))^2

    The state's value in the advantage is that of one sample of the policy.

    Args:
        spec: sizes of the task.
        behavior_flow: makes the flow policy from `spec`.
        critic: makes the Critic.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        beta: inverse temperature of the weights, > 0.
    """

    behavior_flow: BehaviorFlow
    traits = Traits(trains_jointly=True)

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: Callable[[Spec], Critic],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        beta: Positive = 3.0,
    ) -> None:
        super().__init__(spec, {"behavior_flow": behavior_flow(spec), "critic": critic(spec)}, optimizer, seed)
        self.beta = beta

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        states = torch.cat([batch.observations, batch.next_observations])
        actions, next_actions = self.behavior_flow.propose(states, torch.cat([noise.z, noise.z_next])).chunk(2)

        # Policy: flow matching, weighted by the advantage of the data's action over the policy's.
        if self.trains("behavior_flow"):
            with torch.no_grad():
                advantages = (
                    self.critic.values(batch.observations, batch.actions)
                    - self.critic.values(batch.observations, actions)
                ).mean(0)
                weights = advantage_weights(advantages, self.beta)
            loss, metrics = self.behavior_flow.loss(batch, noise.x_0, noise.times, weights)
            yield "behavior_flow", loss, metrics | {"weight": weights.mean(), "advantage": advantages.mean()}

        # Critic: bootstraps from the policy at s'.
        if self.trains("critic"):
            yield "critic", *self.critic.loss(batch, next_actions, noise.levels)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z)

    def panels(self) -> list[Panel]:
        losses = [loss_panel("behavior_flow"), loss_panel("critic", log=True)]
        return [*losses, value_panel(), Panel("advantage weight", {"train/behavior_flow/weight": "mean"}, log=True)]
