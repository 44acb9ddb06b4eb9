"""ImplicitQ: what agents have in common whose values are learned from the data's actions alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deflow.agents.actor_critic import ActorCritic
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.panels import Panel, loss_panel
from deflow.modules.value import Value
from deflow.types import Batch


class ImplicitQ(ActorCritic):
    r"""An agent with parts `critic` and `value`, trained by implicit Q-learning (arXiv 2110.06169).

    .. math::
        \min_\eta &\; E\,L^2_\kappa(\min_k \bar Q_k(s, a) - V_\eta(s)) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m V_\eta(s'))^2

    The policy, which these losses do not know, is another part.
    """

    value: Value
    traits = Traits(takes_lowest=True)

    def value_losses(self, batch: Batch, levels: Tensor | None = None) -> Iterator[Loss]:
        """The losses of both parts, of those that train.

        Args:
            batch: transitions.
            levels: of `FlowNoise`, for a critic that is a flow.
        """
        # Critic: bootstraps from the state value.
        if self.trains("critic"):
            with torch.no_grad():
                next_value = self.value(batch.next_observations)
            yield "critic", *self.critic.loss_from(batch, next_value, levels)

        # Value: an upper expectile over the data's actions.
        if self.trains("value"):
            with torch.no_grad():
                target_values = self.critic.target_values(batch.observations, batch.actions)
            yield "value", *self.value.loss(batch.observations, target_values)

    def value_panels(self) -> list[Panel]:
        """What is shown of both parts."""
        values = {"train/critic/q_mean": "Q(s, a)", "train/value/v": "V(s)"}
        return [loss_panel("critic", log=True), loss_panel("value", log=True), Panel("value", values)]
