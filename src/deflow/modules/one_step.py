"""OneStepActor: a policy that maps noise to an action in a single network evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from lightning import LightningModule
from torch import Tensor

from deflow.modules.critic import value_scale
from deflow.modules.imagination import Decision, Imagination, mean_that_counts
from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Count, Positive, ReadIf, Widths
from deflow.types import Metrics, Spec


class OneStepActor(LightningModule):
    r"""One-step policy :math:`\mu_\omega(s, z)`, distilled from a flow while it climbs the value.

    .. math:: L(\omega) = \alpha \, \|\mu_\omega(s, z) - sg[\mu_\psi(s, z)]\|^2 - E[Q(s, clip(\mu_\omega(s, z)))]

    the first term averaged over the batch and the action dimensions, :math:`Q` the mean over the ensemble, not over its
    targets. Source: FQL (arXiv 2502.02538).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        alpha: weight of the distillation, > 0; the papers tune it for each task.
        normalize_q: divide the value term by the batch mean of its absolute value.
        objective: `value` (the paper's), or `unrolled`, which climbs the rewards of steps that the policy takes in a
            model of the environment and the value of where they end, and is distilled in every state on the way in
            which the task goes on (on average over them, and without a gradient into the states):
            :math:`E[\sum_{h < H} \gamma^h \hat r_h + \gamma^H Q(\hat s_H, a_H)]`, with a gradient through the
            model and all of the policy's actions (SVG, arXiv 1510.09142).
        steps: `H` of `unrolled`.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        alpha: Positive = 10.0,
        normalize_q: bool = False,
        objective: Literal["value", "unrolled"] = "value",
        steps: Annotated[Count, ReadIf("objective", "unrolled")] = 3,
    ) -> None:
        super().__init__()
        self.net = MLP(make_encoder(spec, activation, encoder), spec.action_dim, hidden, spec.action_dim, activation)
        self.action_dim = spec.action_dim  # fewer, if an agent generates more than actions
        self.alpha = alpha
        self.normalize_q = normalize_q
        self.imagined_steps = steps if objective == "unrolled" else 0

    def loss(
        self,
        observations: Tensor,
        z: Tensor,
        proposals: Tensor,
        values: Callable[[Tensor, Tensor], Tensor],
        imagination: Imagination | None = None,
        propose: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Distillation plus value.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, action_dim), or more.
            proposals: what the flow makes of the same `z`, shape (batch, action_dim), or more, without gradient.
            values: `values(s, a)` of shape (members, batch) with a gradient into `s` and `a` only.
            imagination: steps to take before the value is asked; None: none.
            propose: the flow's actions of states and noise, without gradient; only imagined steps need it.
        """
        plans = self(observations, z)
        actions = self._actions(plans)

        # Value, of the actions at hand or of where they lead.
        if imagination is None:
            q = values(observations, actions).mean(0)
            squares = (plans - proposals).square()
        else:
            assert propose is not None
            imagined = imagination.unroll(observations, actions, partial(self._decide, propose))
            q = imagined.value(lambda s, a: values(s, a).mean(0))
            deviations, counts = imagined.from_first(plans - proposals)
            squares = mean_that_counts(deviations.square().flatten(0, 1), counts.flatten())

        # Distillation, of the actions and of what is generated beside them.
        distillation = squares[..., : self.action_dim].mean()
        if squares.shape[-1] > self.action_dim:
            distillation = distillation + squares[..., self.action_dim :].mean()
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

    def _decide(self, propose: Callable[[Tensor, Tensor], Tensor], observations: Tensor, z: Tensor) -> Decision:
        # It is distilled in the states that it reaches; where they are is for the value to decide.
        reached = observations.detach()
        return Decision(self.act(observations, z), self(reached, z) - propose(reached, z))

    def forward(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions before they are clipped, and what is generated beside them, shape (batch, action_dim), or more."""
        return self.net(observations, z)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions in [-1, 1], shape (batch, action_dim)."""
        return self._actions(self(observations, z))

    def _actions(self, plans: Tensor) -> Tensor:
        return plans[..., : self.action_dim].clamp(-1.0, 1.0)
