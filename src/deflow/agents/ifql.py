"""IFQL: clone behaviour with a flow, value it implicitly, act with the best of many samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import MakeCritic, MakeDynamics, take_best
from deflow.agents.algorithm import Loss
from deflow.agents.implicit import ImplicitQ
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel
from deflow.errors import UserError
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.occupancy_flow import OccupancyFlow
from deflow.modules.value import Value
from deflow.ranges import Count, Seed
from deflow.types import Batch, Spec


class IFQL(ImplicitQ):
    r"""Implicit flow Q-learning: the flow counterpart of IDQL, as a baseline of FQL (arXiv 2502.02538).

    .. math::
        \min_\psi &\; E\|v_\psi(s, x_t, t) - (a - x_0)\|^2 \\
        \min_\eta &\; E\,L^2_\kappa(\min_k \bar Q_k(s, a) - V_\eta(s)) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m V_\eta(s'))^2 \\
        a &= \arg\max_{i \le N} \min_k Q_k(s, \mu_\psi(s, z_i))

    Args:
        spec: sizes of the task.
        behavior_flow: makes the BehaviorFlow from `spec`.
        critic: makes the Critic.
        value: makes the Value.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        best_of_n: N, samples scored for each action taken.
        dynamics: makes the model of the environment's steps, see `TransitionModel`; None: there is none.

    Raises:
        UserError: for `agent/critic=occupancy`.
    """

    behavior_flow: BehaviorFlow
    expands = False

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: MakeCritic,
        value: Callable[[Spec], Value],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        best_of_n: Count = 32,
        dynamics: MakeDynamics | None = None,
    ) -> None:
        parts = {"behavior_flow": behavior_flow(spec), "critic": critic(spec), "value": value(spec)}
        super().__init__(spec, parts, optimizer, seed, dynamics=dynamics)
        if isinstance(self.critic, OccupancyFlow):
            raise UserError(
                "IFQL's values know no policy, whose future agent/critic=occupancy samples: use ensemble or flow"
            )
        self.best_of_n = best_of_n

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield from self.dynamics_loss(batch, noise)

        # Behaviour: flow matching on the data's actions.
        if self.trains("behavior_flow"):
            yield "behavior_flow", *self.behavior_flow.loss(batch, noise.x_0, noise.times)

        # Critic and value: from the data's actions alone.
        yield from self.value_losses(batch, noise.levels)

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        return (self.best_of_n, self.spec.action_dim)

    def propose(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z[:, 0])

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        batch, candidates, action_dim = z.shape
        actions = self.behavior_flow.propose(observations, z.reshape(-1, action_dim))
        values = self.critic.values(observations, actions).amin(0)
        return take_best(actions.reshape(z.shape), values.reshape(batch, candidates))

    def panels(self) -> list[Panel]:
        return [loss_panel("behavior_flow"), *self.value_panels(), *self.dynamics_panels()]
