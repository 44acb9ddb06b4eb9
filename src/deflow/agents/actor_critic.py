"""ActorCritic: what agents with a critic have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss
from deflow.agents.base import MODEL, Agent
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel
from deflow.errors import UserError
from deflow.modules.critic import Critic
from deflow.modules.flow_critic import FlowCritic
from deflow.modules.imagination import Decision, Imagination
from deflow.modules.occupancy_flow import OccupancyFlow
from deflow.modules.transition_flow import TransitionModel
from deflow.types import Batch, Spec

MakeCritic = Callable[[Spec], Critic | FlowCritic | OccupancyFlow]
MakeDynamics = Callable[[Spec], TransitionModel]
ActionsOf = Callable[[Tensor, Tensor], Tensor]  # states and noise


class ActorCritic(Agent):
    """An agent with a part `critic`, whose ensemble's mean is the value of an action.

    It may have one more, `dynamics`, a model of the environment's steps: an algorithm that offers it yields
    `dynamics_loss` among its losses, and its noise has `FlowNoise.outcomes`. It may then let the critic's target take
    steps in the model, by `expanded`, and its policy climb what it imagines, by `imagination`.

    Args:
        spec: sizes of the task.
        parts: names of the attributes that hold the trainable modules.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        every: rhythm of a part beside others, see `Agent`.
        dynamics: makes the model; None: there is none.

    Raises:
        UserError: if something would take steps in a model that is not there, or that it cannot make use of.
    """

    critic: Critic
    dynamics: TransitionModel
    valuing_part = "critic"
    climber: str | None = None  # the part whose objective may take steps in the model
    expands = True  # whether the critic's target, of a policy at s', may take steps in the model

    def __init__(
        self,
        spec: Spec,
        parts: Mapping[str, nn.Module],
        optimizer: Callable[[Any], Optimizer],
        seed: int,
        every: Mapping[str, int] = MappingProxyType({}),
        dynamics: MakeDynamics | None = None,
    ) -> None:
        # Made last, so that the other parts begin with the same weights as without it.
        model = {} if dynamics is None else {MODEL: dynamics(spec)}
        super().__init__(spec, {**parts, **model}, optimizer, seed, every)
        self._check_imagined()

    def _check_imagined(self) -> None:
        if self.transition_model is None:
            if self.policy_steps:
                raise UserError("objective=unrolled takes steps in a model of the environment: add agent/dynamics=flow")
        elif self.transition_model.expansion:
            if not self.expands:
                raise UserError(f"agent.dynamics.expansion is of targets with a policy: {type(self).__name__} has none")
            if isinstance(self.critic, OccupancyFlow) or self.critic.next_draws > 1:
                raise UserError(
                    "agent.dynamics.expansion needs a critic with one target for each transition: use "
                    "agent/critic=ensemble, or flow with samples=1"
                )

    @property
    def transition_model(self) -> TransitionModel | None:
        return self.dynamics if MODEL in self.parts else None

    @property
    def outcome_dim(self) -> int:
        """Width of the noise, `FlowNoise.outcomes`, from which the model draws a step's outcome; 0 without a model."""
        return 0 if self.transition_model is None else self.transition_model.outcome_dim

    def dynamics_loss(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        """The loss of the model of the environment's steps, if there is one and it trains."""
        if self.transition_model is not None and self.trains(MODEL):
            assert noise.outcomes is not None
            yield MODEL, *self.transition_model.loss(batch, noise.outcomes, noise.times)

    def dynamics_panels(self) -> list[Panel]:
        """What is shown of that model."""
        return [] if self.transition_model is None else [loss_panel(MODEL)]

    # Imagined steps.

    @property
    def policy_steps(self) -> int:
        """Steps that the policy's objective asks to take in the model."""
        return 0

    @property
    def asked_steps(self) -> tuple[int, int]:
        return 0 if self.transition_model is None else self.transition_model.expansion, self.policy_steps

    @property
    def steps_of_stage(self) -> tuple[int, int]:
        expansion, policy_steps = self.asked_steps
        climbs = self.climber is not None and self.trains(self.climber)
        return expansion if self.trains("critic") else 0, policy_steps if climbs else 0

    def _steps(self) -> tuple[int, ...]:
        """The steps that are asked for and allowed, as in `asked_steps`."""
        allowed = max(self.asked_steps) if self.allowed_steps is None else self.allowed_steps
        return tuple(min(steps, allowed) for steps in self.asked_steps)

    def expanded(self, batch: Batch, next_actions: Tensor, noise: FlowNoise, policy: ActionsOf) -> tuple[Batch, Tensor]:
        r"""The batch with what is imagined after it, and the policy's actions where that ends.

        With `H` steps in the model, :math:`y = r + d \sum_{h < H} d_h \hat r_h + d \, d_H \bar Q(\hat s_H, a_H)`: the
        batch as one of longer transitions. Source: model-based value expansion (arXiv 1803.00101).

        Args:
            batch: single steps.
            next_actions: the policy's at `s'`, shape (batch, action_dim).
            noise: of the update.
            policy: actions of states and noise.
        """
        steps, _ = self._steps()
        if not steps:
            return batch, next_actions
        with torch.no_grad():
            imagined = self._imagination(noise, slice(None, steps)).unroll(
                batch.next_observations, next_actions, lambda states, z: Decision(policy(states, z), z)
            )
        longer = batch._replace(
            rewards=batch.rewards + batch.discounts * imagined.rewards,
            discounts=batch.discounts * imagined.discounts,
            next_observations=imagined.observations,
        )
        return longer, imagined.actions

    def imagination(self, noise: FlowNoise) -> Imagination | None:
        """What the policy's objective takes its steps in; None if it takes none."""
        expansion, steps = self._steps()
        return self._imagination(noise, slice(expansion, expansion + steps)) if steps else None

    def _imagination(self, noise: FlowNoise, steps: slice) -> Imagination:
        assert self.transition_model is not None
        assert noise.imagined is not None
        z, outcomes = noise.imagined[:, steps].split([self.spec.action_dim, self.outcome_dim], dim=-1)
        return Imagination(self.transition_model, z, outcomes, forgetful=not self.stacked)

    # What all of them share.

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> Any:
        return self.flow_noise(batch, generator)

    def flow_noise(self, batch: Batch, generator: torch.Generator, next_draws: int = 1) -> FlowNoise:
        """All of an update, with so many of the policy's actions at `s'`."""
        return FlowNoise.draw(
            batch, generator, self.critic.levels, next_draws, self.outcome_dim, imagined_steps=sum(self._steps())
        )

    def require_ensemble(self) -> None:
        """Raise `UserError` unless values are an ensemble's: these losses draw no noise for a critic that is a flow."""
        if not isinstance(self.critic, Critic):
            raise UserError(f"{type(self).__name__} needs an ensemble of critics: use agent/critic=ensemble")

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic.values(observations, actions).mean(0)


def take_best(actions: Tensor, scores: Tensor) -> Tensor:
    """The action with the highest score of each state, shape (batch, action_dim).

    Args:
        actions: shape (batch, candidates, action_dim).
        scores: shape (batch, candidates).
    """
    return actions[torch.arange(len(actions), device=actions.device), scores.argmax(1)]
