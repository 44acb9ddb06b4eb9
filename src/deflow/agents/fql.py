"""FQL: distil a behaviour flow into a one-step policy that climbs the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic, MakeCritic, MakeDynamics
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.errors import UserError
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.one_step import OneStepActor
from deflow.modules.statistics import PathStatistics
from deflow.ranges import Seed
from deflow.types import Batch, Foresight, Spec


class FQL(ActorCritic):
    r"""Flow Q-learning (arXiv 2502.02538).

    .. math::
        \min_\psi &\; E\|v_\psi(s, x_t, t) - (a - x_0)\|^2 \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m \bar Q(s', \mu_\omega(s', z')))^2 \\
        \min_\omega &\; \alpha E\|\mu_\omega(s, z) - sg[\mu_\psi(s, z)]\|^2 - E\,Q(s, \mu_\omega(s, z))

    Differences from the released code: none in the losses; GELU is exact (there its tanh form); the three parts may
    train in stages.

    With `path` the flow and the one-step policy generate trajectories: beside the actions of a chunk the states after
    each of them, :math:`(s_{t + h} - s_t - \mu_h) / \sigma_h`, from one noise vector in one evaluation. Values see the
    actions alone; `foresee` gives the states.

    Args:
        spec: sizes of the task.
        behavior_flow: makes the BehaviorFlow from `spec`.
        critic: makes the Critic.
        actor: makes the OneStepActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        dynamics: makes the model of the environment's steps, see `TransitionModel`; None: there is none.
        path: statistics that standardise the states on the way; None: actions alone are generated.

    Raises:
        UserError: for a path of images, of other sizes, or with imagined steps.
    """

    behavior_flow: BehaviorFlow
    actor: OneStepActor
    path_mean: Tensor  # (horizon, observation_dim)
    path_std: Tensor
    climber = "actor"
    traits = Traits(never_acts=("behavior_flow",))
    headline = MappingProxyType({"flow_loss": "behavior_flow/loss", "q": "actor/q", "distill": "actor/distillation"})

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: MakeCritic,
        actor: Callable[[Spec], OneStepActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        dynamics: MakeDynamics | None = None,
        path: PathStatistics | None = None,
    ) -> None:
        self._path_dim = 0 if path is None else spec.horizon * spec.observation_dim
        whole = spec._replace(action_dim=spec.action_dim + self._path_dim)
        parts = {"behavior_flow": behavior_flow(whole), "critic": critic(spec), "actor": actor(whole)}
        super().__init__(spec, parts, optimizer, seed, dynamics=dynamics)
        self.behavior_flow.action_dim = self.actor.action_dim = spec.action_dim
        if path is not None:
            self.traits = self.traits._replace(reads_path=True)
            self._register_path(path)

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> FlowNoise:
        return self.flow_noise(self._planned(batch), generator, self.critic.next_draws)

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield from self.dynamics_loss(batch, noise)

        # Behaviour: flow matching on the data's actions.
        if self.trains("behavior_flow"):
            yield "behavior_flow", *self.behavior_flow.loss(self._planned(batch), noise.x_0, noise.times)

        # Critic: bootstraps from the one-step policy at s', anew for each draw of a flow critic.
        if self.trains("critic"):
            with torch.no_grad():
                next_actions = self.actor.act(batch.next_observations, noise.z_next)
            target_batch, target_actions = self.expanded(batch, next_actions, noise, self.actor.act)
            yield "critic", *self.critic.loss(target_batch, target_actions, noise.levels)

        # Actor: distilled from the flow at the same noise, pathwise through Q.
        if self.trains("actor"):
            proposals = self.behavior_flow.propose(batch.observations, noise.z)
            yield (
                "actor",
                *self.actor.loss(
                    batch.observations,
                    noise.z,
                    proposals,
                    values=self.critic.frozen_values,
                    imagination=self.imagination(noise),
                    propose=self.behavior_flow.propose,
                ),
            )

    @property
    def policy_steps(self) -> int:
        return self.actor.imagined_steps

    # Trajectories.

    def _planned(self, batch: Batch) -> Batch:
        """The batch with all that is generated in the place of the actions."""
        if not self._path_dim:
            return batch
        assert batch.path is not None
        changes = batch.path - batch.observations[:, None]
        return batch._replace(
            actions=torch.cat([batch.actions, ((changes - self.path_mean) / self.path_std).flatten(1)], dim=-1)
        )

    def foresee(self, observations: Tensor, z: Tensor) -> Foresight | None:
        if not self._path_dim:
            return None
        changes = self.actor(observations, z)[:, self.spec.action_dim :].unflatten(1, self.path_std.shape)
        return Foresight(observations[:, None] + self.path_mean + self.path_std * changes, self.path_std)

    def _register_path(self, path: PathStatistics) -> None:
        if self.spec.image is not None:
            raise UserError("agent.path is of states, not images: leave it at null")
        if any(self.asked_steps):
            raise UserError("agent.path goes with no imagined steps: leave it at null, or those out")
        size = (self.spec.horizon, self.spec.observation_dim)
        for name in ("mean", "std"):
            numbers = torch.tensor(path[name], dtype=torch.float32)
            if len(numbers) not in (1, self._path_dim):
                raise UserError(f"agent.path.{name} needs {self._path_dim} numbers, got {len(numbers)}")
            self.register_buffer(f"path_{name}", numbers.expand(self._path_dim).reshape(size).clone())

    # Acting.

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        return (self.spec.action_dim + self._path_dim,)

    def propose(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z)[:, : self.spec.action_dim]

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
