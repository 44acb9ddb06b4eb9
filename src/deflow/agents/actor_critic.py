"""ActorCritic: what agents with a critic have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deflow.agents.base import Agent, Loss
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel
from deflow.errors import UserError
from deflow.modules.critic import Critic
from deflow.modules.transition_flow import TransitionModel
from deflow.types import Batch, Spec

MakeDynamics = Callable[[Spec], TransitionModel]


class ActorCritic(Agent):
    """An agent with a part `critic`, whose ensemble's mean is the value of an action.

    It may have one more, `dynamics`, a model of the environment's steps: an algorithm that offers it yields
    `dynamics_loss` among its losses, and its noise has `FlowNoise.outcomes`.

    Args:
        spec: sizes of the task.
        parts: names of the attributes that hold the trainable modules.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        every: rhythm of a part beside others, see `Agent`.
        dynamics: makes the model; None: there is none.
    """

    critic: Critic

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
        model = {} if dynamics is None else {"dynamics": dynamics(spec)}
        super().__init__(spec, {**parts, **model}, optimizer, seed, every)

    @property
    def transition_model(self) -> TransitionModel | None:
        return cast(TransitionModel, self.dynamics) if "dynamics" in self.parts else None

    @property
    def outcome_dim(self) -> int:
        """Of `FlowNoise`: width of what a step leads to; 0 without a model of it."""
        return 0 if self.transition_model is None else self.transition_model.outcome_dim

    def dynamics_loss(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        """The loss of the model of the environment's steps, if there is one and it trains."""
        if self.transition_model is not None and self.trains("dynamics"):
            assert noise.outcomes is not None
            yield "dynamics", *self.transition_model.loss(batch, noise.outcomes, noise.times)

    def dynamics_panels(self) -> list[Panel]:
        """What is shown of that model."""
        return [] if self.transition_model is None else [loss_panel("dynamics")]

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> Any:
        return FlowNoise.draw(batch, generator, self.critic.levels, outcome_dim=self.outcome_dim)

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
