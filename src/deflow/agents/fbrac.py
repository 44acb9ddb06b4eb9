"""FBRAC: a flow policy that climbs the value by back-propagation through the ODE solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic, MakeCritic, MakeDynamics
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.flow.ode import Gradient
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import value_scale
from deflow.ranges import Positive, Seed
from deflow.types import Batch, Spec


class FBRAC(ActorCritic):
    r"""Flow behaviour-regularised actor-critic, as a baseline of FQL (arXiv 2502.02538).

    .. math::
        \min_\psi &\; \alpha E\|v_\psi(s, x_t, t) - (a - x_0)\|^2 - E\,Q(s, clip(\mu_\psi(s, z))) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m \bar Q(s', \mu_\psi(s', z')))^2

    The second term's gradient passes through every step of the solver.

    Args:
        spec: sizes of the task.
        behavior_flow: makes the flow policy from `spec`.
        critic: makes the Critic.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        alpha: weight of the flow matching against the value, > 0; the papers tune it for each task.
        normalize_q: divide the value term by the batch mean of its absolute value.
        gradient: `backprop` through the solver, or the `adjoint` method.
        dynamics: makes the model of the environment's steps, see `TransitionModel`; None: there is none.
    """

    behavior_flow: BehaviorFlow
    traits = Traits(trains_jointly=True, differentiates_flow=True)

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: MakeCritic,
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        alpha: Positive = 10.0,
        normalize_q: bool = False,
        gradient: Gradient = "backprop",
        dynamics: MakeDynamics | None = None,
    ) -> None:
        super().__init__(
            spec, {"behavior_flow": behavior_flow(spec), "critic": critic(spec)}, optimizer, seed, dynamics=dynamics
        )
        self.alpha, self.normalize_q = alpha, normalize_q
        self.gradient: Gradient = gradient

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield from self.dynamics_loss(batch, noise)

        # Policy: flow matching on the data's actions, and the value of the flow's own.
        if self.trains("behavior_flow"):
            matching, _ = self.behavior_flow.loss(batch, noise.x_0, noise.times)
            actions = self.behavior_flow.sample(batch.observations, noise.z, self.gradient).clamp(-1.0, 1.0)
            q = self.critic.frozen_values(batch.observations, actions).mean(0)
            value_loss = -q.mean()
            if self.normalize_q:
                value_loss = value_loss / value_scale(q)
            loss = self.alpha * matching + value_loss
            metrics = {"loss": loss, "matching": matching, "value_loss": value_loss, "q": q.mean()}
            yield "behavior_flow", loss, {name: value.detach() for name, value in metrics.items()}

        # Critic: bootstraps from the policy at s'.
        if self.trains("critic"):
            next_actions = self.behavior_flow.propose(batch.next_observations, noise.z_next)
            target_batch, target_actions = self.expanded(batch, next_actions, noise, self.behavior_flow.propose)
            yield "critic", *self.critic.loss(target_batch, target_actions, noise.levels)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z)

    def panels(self) -> list[Panel]:
        losses = [loss_panel("behavior_flow"), loss_panel("critic", log=True)]
        matching = "flow matching, before alpha"
        terms = {"train/behavior_flow/matching": matching, "train/behavior_flow/value_loss": "value"}
        return [*losses, Panel("terms", terms), value_panel("behavior_flow"), *self.dynamics_panels()]
