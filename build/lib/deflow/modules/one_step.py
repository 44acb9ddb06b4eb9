"""OneStepActor: a policy that maps noise to an action in a single network evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning import LightningModule
from torch import Tensor

from deflow.modules.critic import value_scale
from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Positive, Widths
from deflow.types import Metrics, Spec


class OneStepActor(LightningModule):
    r"""One-step policy :math:`\mu_\omega(s, z)`, distilled from a flow while it climbs the value.

    .. math:: L(\omega) = \alpha \, \|\mu_\omega(s, z) - sg[\mu_\psi(s, z)]\|^2 - E[\bar Q(s, clip(\mu_\omega(s, z)))]

    the first term averaged over the batch and the action dimensions, :math:`\bar Q` the mean over the ensemble.
    Source: FQL (arXiv 2502.02538).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        alpha: weight of the distillation, > 0; the papers tune it for each task.
        normalize_q: divide the value term by the batch mean of its absolute value.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        alpha: Positive = 10.0,
        normalize_q: bool = False,
    ) -> None:
        super().__init__()
        self.net = MLP(make_encoder(spec, activation, encoder), spec.action_dim, hidden, spec.action_dim, activation)
        self.alpha = alpha
        self.normalize_q = normalize_q

    def loss(
        self, observations: Tensor, z: Tensor, proposals: Tensor, values: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Metrics]:
        """Distillation plus value.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, action_dim).
            proposals: the flow's actions from the same `z`, shape (batch, action_dim), without gradient.
            values: `values(s, a)` of shape (members, batch) with a gradient into `a` only.
        """
        actions = self(observations, z)

        # Distillation.
        distillation = (actions - proposals).square().mean()

        # Value.
        q = values(observations, actions.clamp(-1.0, 1.0)).mean(0)
        value_loss = -q.mean()
        if self.normalize_q:
            value_loss = value_loss / value_scale(q)

        loss = self.alpha * distillation + value_loss
        return loss, {
            "loss": loss.detach(),
            "distillation": distillation.detach(),
            "value_loss": value_loss.detach(),
            "q": q.detach().mean(),
        }

    def forward(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions before they are clipped, shape (batch, action_dim)."""
        return self.net(observations, z)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions in [-1, 1], shape (batch, action_dim)."""
        return self(observations, z).clamp(-1.0, 1.0)
