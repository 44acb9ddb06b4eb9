"""ActorCritic: what agents with a critic have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deflow.agents.base import Agent
from deflow.agents.noise import FlowNoise
from deflow.errors import UserError
from deflow.modules.critic import Critic
from deflow.types import Batch


class ActorCritic(Agent):
    """An agent with a part `critic`, whose ensemble's mean is the value of an action."""

    critic: Critic

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> Any:
        return FlowNoise.draw(batch, generator, self.critic.levels)

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
