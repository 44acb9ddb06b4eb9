"""FQL: distil a behaviour flow into a one-step policy that climbs the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic, MakeDynamics
from deflow.agents.base import Loss
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import Critic
from deflow.modules.one_step import OneStepActor
from deflow.ranges import Seed
from deflow.types import Batch, Spec


class FQL(ActorCritic):
    r"""Flow Q-learning (arXiv 2502.02538).

    .. math::
        \min_\psi &\; E\|v_\psi(s, x_t, t) - (a - x_0)\|^2 \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m \bar Q(s', \mu_\omega(s', z')))^2 \\
        \min_\omega &\; \alpha E\|\mu_\omega(s, z) - sg[\mu_\psi(s, z)]\|^2 - E\,Q(s, \mu_\omega(s, z))

    Differences from the released code: none in the losses; the three parts may train in stages.

    Args:
        spec: sizes of the task.
        behavior_flow: makes the BehaviorFlow from `spec`.
        critic: makes the Critic.
        actor: makes the OneStepActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        dynamics: makes the model of the environment's steps, see `TransitionModel`; None: there is none.
    """

    behavior_flow: BehaviorFlow
    actor: OneStepActor
    headline = MappingProxyType({"flow_loss": "behavior_flow/loss", "q": "actor/q", "distill": "actor/distillation"})

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: Callable[[Spec], Critic],
        actor: Callable[[Spec], OneStepActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        dynamics: MakeDynamics | None = None,
    ) -> None:
        parts = {"behavior_flow": behavior_flow(spec), "critic": critic(spec), "actor": actor(spec)}
        super().__init__(spec, parts, optimizer, seed, dynamics=dynamics)

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> FlowNoise:
        return self.flow_noise(batch, generator, self.critic.next_draws)

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield from self.dynamics_loss(batch, noise)

        # Behaviour: flow matching on the data's actions.
        if self.trains("behavior_flow"):
            yield "behavior_flow", *self.behavior_flow.loss(batch, noise.x_0, noise.times)

        # Critic: bootstraps from the one-step policy at s', anew for each draw of a flow critic.
        if self.trains("critic"):
            with torch.no_grad():
                next_actions = self.actor.act(batch.next_observations, noise.z_next)
            longer, next_actions = self.expanded(batch, next_actions, noise, self.actor.act)
            yield "critic", *self.critic.loss(longer, next_actions, noise.levels)

        # Actor: distilled from the flow at the same noise, pathwise through Q.
        if self.trains("actor"):
            proposals = self.behavior_flow.propose(batch.observations, noise.z)
            ahead = self.critic.frozen_values, self.imagination(noise), self.behavior_flow.propose
            yield "actor", *self.actor.loss(batch.observations, noise.z, proposals, *ahead)

    @property
    def policy_steps(self) -> int:
        return self.actor.imagined_steps

    def propose(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.act(observations, z)

    def panels(self) -> list[Panel]:
        distillation = {"train/actor/distillation": "mean square"}
        return [
            loss_panel("behavior_flow"),
            loss_panel("critic", log=True),
            value_panel("actor"),
            Panel("distance from the proposal", distillation, log=True),
            *self.dynamics_panels(),
        ]
