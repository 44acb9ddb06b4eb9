"""Refiner: a residual that moves a proposal toward value inside a trust region."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from deflow.errors import UserError
from deflow.modules.constraints import Constraint, ConstraintSettings, Refinement
from deflow.modules.critic import advantage_weights, value_gradient, value_scale
from deflow.modules.imagination import Decision, Imagination
from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Count, Limit, Positive, ReadIf, Widths
from deflow.types import Batch, Metrics, Spec

Objective = Literal["value", "gradient_step", "demonstration", "unrolled"]
ValueOf = Callable[[Tensor, Tensor], Tensor]  # states and actions: mean over the ensemble, shape (batch,)


class Refiner(LightningModule):
    r"""Residual :math:`f_\phi(s, a_{base})` with :math:`a_\pi = clip(a_{base} + \Delta a)`, :math:`\Delta a = f_\phi`.

    .. math::
        L(\phi) = -\frac{E[Q(s, a_\pi)]}{sg[E|Q|]} + \sum_i sg[\lambda_i] \, C_i

    with :math:`Q` the mean over the ensemble, not over its targets. The first constraint is the trust region
    :math:`\|\Delta a\|^2 \le \delta`, the mean over batch and dimensions; see `Constraint` for the multipliers.
    Source: DeFlow (arXiv 2601.10471). Difference from the released code: a fixed alpha multiplies the penalty
    once (there it does twice).

    Three other objectives may take the first term's place, inside the same constraints:

    - `gradient_step`: :math:`E\|\Delta a - \eta g\|^2 / 2\eta`, a regression to one step uphill from the proposal, with
      :math:`g = \nabla_a Q(s, a_{base}) / sg[E|Q|]`. Its gradient at :math:`\Delta a = 0` is that of `value`.
    - `demonstration`: :math:`E\,w\,\|a_\pi - a\|^2`, a regression to the data's action where it is better than the
      proposal, :math:`w = \min(\exp(\beta(Q(s, a) - Q(s, a_{base}))), 100)`.
    - `unrolled`: as `value`, of :math:`\sum_{h < H} \gamma^h \hat r_h + \gamma^H Q(\hat s_H, a_H)` in the place of
      :math:`Q(s, a_\pi)`: rewards of steps that the policy takes in a model of the environment, and the value of
      where they end, with a gradient through the model and all refined actions (SVG, arXiv 1510.09142). The trust
      region holds in the step, imagined or not, that is farthest from its proposals.

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        trust_region: delta, the limit of the mean squared residual in squared action units, > 0; or one limit an
            action dimension, each with a multiplier of its own.
        lagrange: learn the trust region's multiplier; otherwise it stays at `alpha`.
        alpha: the fixed multiplier when `lagrange` is off, > 0; a learned one starts at `exp(1)`.
        objective: `value` (the paper's), `gradient_step`, `demonstration` or `unrolled`.
        eta: step of `gradient_step` in action units for a unit of the normalised gradient, > 0.
        beta: inverse temperature of `demonstration`'s weights in units of reward, > 0.
        constraints: further ones, each a mapping with the arguments of `Constraint`.
        steps: `H` of `unrolled`.

    Raises:
        UserError: for an impossible constraint, or two of one kind.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        trust_region: Limit = 0.001,
        lagrange: bool = True,
        alpha: Annotated[Positive, ReadIf("lagrange", False)] = 10.0,
        objective: Objective = "value",
        eta: Annotated[Positive, ReadIf("objective", "gradient_step")] = 0.1,
        beta: Annotated[Positive, ReadIf("objective", "demonstration")] = 3.0,
        constraints: Sequence[ConstraintSettings] = (),
        steps: Annotated[Count, ReadIf("objective", "unrolled")] = 3,
    ) -> None:
        super().__init__()
        objectives = {
            "value": self._value_loss,
            "gradient_step": self._gradient_step_loss,
            "demonstration": self._demonstration_loss,
            "unrolled": self._value_loss,  # of no steps, if a stage allows none
        }
        self.imagined_steps = steps if objective == "unrolled" else 0
        self._objective = objectives[objective]
        self.eta, self.beta = eta, beta
        self.net = MLP(make_encoder(spec, activation, encoder), spec.action_dim, hidden, spec.action_dim, activation)
        multiplier = None if lagrange else alpha
        first: ConstraintSettings = {"kind": "trust_region", "limit": trust_region, "multiplier": multiplier}
        self.constraints = nn.ModuleDict()
        for settings in (first, *constraints):
            constraint = Constraint(**settings)
            if constraint.limit.ndim and constraint.limit.shape != (spec.action_dim,):
                raise UserError(
                    f"the constraint '{settings['kind']}' needs one limit or {spec.action_dim}, one an action "
                    f"dimension; got {len(constraint.limit)}"
                )
            if settings["kind"] in self.constraints:
                raise UserError(f"the constraint '{settings['kind']}' is given twice")
            self.constraints[settings["kind"]] = constraint

    def loss(
        self,
        batch: Batch,
        base_actions: Tensor,
        next_actions: Tensor,
        values: Callable[[Tensor, Tensor], Tensor],
        imagination: Imagination | None = None,
        propose: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The refinement loss plus the multipliers'.

        Args:
            batch: transitions.
            base_actions: proposals, shape (batch, action_dim), in [-1, 1].
            next_actions: the policy's actions at `s'`, shape (batch, action_dim), without gradient.
            values: `values(s, a)` of shape (members, batch) with a gradient into `s` and `a` only.
            imagination: steps to take before the value is asked; None: none.
            propose: proposals of states and noise, with a gradient into the states; only imagined steps need it.
        """
        residual = self.residual(batch.observations, base_actions)
        actions = (base_actions + residual).clamp(-1.0, 1.0)

        # What the residual is for.
        def value(observations: Tensor, actions: Tensor) -> Tensor:
            return values(observations, actions).mean(0)

        counts = None
        if imagination is None:
            loss, metrics = self._objective(batch, base_actions, actions, value)
        else:
            assert propose is not None
            imagined = imagination.unroll(batch.observations, actions, partial(self._decide, propose))
            loss, metrics = self._climbed(imagined.value(value))
            residual, counts = imagined.from_first(residual)

        # Trust region and whatever else is constrained.
        refinement = Refinement(residual, actions, batch.actions, next_actions, counts)
        for kind, constraint in self.constraints.items():
            penalty, multiplier_loss, values_of_it = cast(Constraint, constraint).loss(refinement)
            loss = loss + penalty + multiplier_loss
            metrics |= {f"{kind}/{name}": value for name, value in values_of_it.items()}
        return loss, metrics | {"loss": loss.detach()}

    def _value_loss(
        self, batch: Batch, base_actions: Tensor, actions: Tensor, value: ValueOf
    ) -> tuple[Tensor, Metrics]:
        return self._climbed(value(batch.observations, actions))

    @staticmethod
    def _climbed(q: Tensor) -> tuple[Tensor, Metrics]:
        loss = -q.mean() / value_scale(q)
        return loss, {"value_loss": loss.detach(), "q": q.detach().mean()}

    def _gradient_step_loss(
        self, batch: Batch, base_actions: Tensor, actions: Tensor, value: ValueOf
    ) -> tuple[Tensor, Metrics]:
        uphill, q = value_gradient(value, batch.observations, base_actions)
        step = self.eta * uphill / value_scale(q)
        loss = (actions - (base_actions + step).clamp(-1.0, 1.0)).square().sum(-1).mean() / (2 * self.eta)
        return loss, {"regression": loss.detach(), "step": step.square().mean(), "q": q.mean()}

    def _demonstration_loss(
        self, batch: Batch, base_actions: Tensor, actions: Tensor, value: ValueOf
    ) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            q = value(batch.observations, base_actions)
            advantage = value(batch.observations, batch.actions) - q
            weight = advantage_weights(advantage, self.beta)
        loss = (weight * (actions - batch.actions).square().mean(-1)).mean()
        return loss, {"regression": loss.detach(), "weight": weight.mean(), "q": q.mean()}

    def _decide(self, propose: Callable[[Tensor, Tensor], Tensor], observations: Tensor, z: Tensor) -> Decision:
        base_actions = propose(observations, z)
        residual = self.residual(observations, base_actions)
        return Decision((base_actions + residual).clamp(-1.0, 1.0), residual)

    def residual(self, observations: Tensor, base_actions: Tensor) -> Tensor:
        """The residual `da`, shape (batch, action_dim)."""
        return self.net(observations, base_actions)

    def refine(self, observations: Tensor, base_actions: Tensor) -> Tensor:
        """The refined actions, clipped to [-1, 1], of the proposals' shape; there may be several for a state."""
        return (base_actions + self.residual(observations, base_actions)).clamp(-1.0, 1.0)
