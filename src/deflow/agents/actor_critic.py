"""ActorCritic: what agents with a critic have in common."""

from __future__ import annotations

from torch import Tensor

from deflow.agents.base import Agent
from deflow.modules.critic import Critic


class ActorCritic(Agent):
    """An agent with a part `critic`, whose ensemble's mean is the value of an action."""

    critic: Critic

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic.values(observations, actions).mean(0)
