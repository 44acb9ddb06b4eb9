"""FAWAC: flow matching in which better actions weigh more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic, MakeCritic, MakeDynamics
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import advantage_weights
from deflow.modules.value import StateValue
from deflow.ranges import Positive, Seed
from deflow.types import Batch, Spec


class FAWAC(ActorCritic):
    r"""Flow advantage-weighted actor-critic, as a baseline of FQL (arXiv 2502.02538); AWAC: arXiv 2006.09359.

    .. math::
        \min_\psi &\; E\,w\,\|v_\psi(s, x_t, t) - (a - x_0)\|^2, \quad
        w = \min(\exp(\alpha (\mathrm{mean}_k Q_k(s, a) - V_\eta(s))), 100) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m \bar Q(s', \mu_\psi(s', z')))^2 \\
        \min_\eta &\; E\,\mathrm{mean}_k (\bar Q_k(s, a) - V_\eta(s))^2

    No code of it was released with FQL; the losses are those of QAM's (`ColinQiyangLi/qam`).

    Args:
        spec: sizes of the task.
        behavior_flow: makes the flow policy from `spec`.
        critic: makes the Critic.
        value: makes the StateValue.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        alpha: inverse temperature of the weights in 1 / units of reward, > 0; the papers tune it for each task.
        dynamics: makes the model of the environment's steps, see `TransitionModel`; None: there is none.
    """

    behavior_flow: BehaviorFlow
    value: StateValue
    traits = Traits(trains_jointly=True)

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: MakeCritic,
        value: Callable[[Spec], StateValue],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        alpha: Positive = 3.0,
        dynamics: MakeDynamics | None = None,
    ) -> None:
        parts = {"behavior_flow": behavior_flow(spec), "critic": critic(spec), "value": value(spec)}
        super().__init__(spec, parts, optimizer, seed, dynamics=dynamics)
        self.alpha = alpha

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield from self.dynamics_loss(batch, noise)

        # Policy: flow matching, weighted by the advantage of the data's action.
        if self.trains("behavior_flow"):
            with torch.no_grad():
                q = self.critic.values(batch.observations, batch.actions).mean(0)
                advantages = q - self.value(batch.observations)
                weights = advantage_weights(advantages, self.alpha)
            loss, metrics = self.behavior_flow.loss(batch, noise.x_0, noise.times, weights)
            yield "behavior_flow", loss, metrics | {"weight": weights.mean(), "advantage": advantages.mean()}

        # Critic: bootstraps from the policy at s'.
        if self.trains("critic"):
            next_actions = self.behavior_flow.propose(batch.next_observations, noise.z_next)
            target_batch, target_actions = self.expanded(batch, next_actions, noise, self.behavior_flow.propose)
            yield "critic", *self.critic.loss(target_batch, target_actions, noise.levels)

        # Value: the mean value of the data's actions.
        if self.trains("value"):
            with torch.no_grad():
                target_values = self.critic.target_values(batch.observations, batch.actions)
            yield "value", *self.value.loss(batch.observations, target_values)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z)

    def panels(self) -> list[Panel]:
        losses = [loss_panel("behavior_flow"), loss_panel("critic", log=True), loss_panel("value", log=True)]
        weight = Panel("advantage weight", {"train/behavior_flow/weight": "mean"}, log=True)
        return [*losses, value_panel(), weight, *self.dynamics_panels()]
