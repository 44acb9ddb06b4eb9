"""Refiner: a residual that moves a proposal toward value inside a trust region."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from deflow.distributed import mean_over_ranks
from deflow.errors import UserError
from deflow.modules.constraints import Constraint, Refinement
from deflow.nets.mlp import MLP, Activation
from deflow.types import Batch, Metrics, Spec


class Refiner(LightningModule):
    r"""Residual :math:`f_\phi(s, a_{base})` with :math:`a_\pi = clip(a_{base} + \Delta a)`, :math:`\Delta a = f_\phi`.

    .. math::
        L(\phi) = -\frac{E[\bar Q(s, a_\pi)]}{sg[E|\bar Q|]} + \sum_i sg[\lambda_i] \, C_i

    with :math:`\bar Q` the mean over the ensemble. The first constraint is the trust region
    :math:`\|\Delta a\|^2 \le \delta`, the mean over batch and dimensions; see `Constraint` for the multipliers.
    Source: DeFlow (arXiv 2601.10471). Difference from the released code: a fixed alpha multiplies the penalty
    once (there it does twice).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: `gelu` (exact) or `gelu_tanh`.
        trust_region: delta, the limit of the mean squared residual in squared action units, > 0; or one limit an
            action dimension, each with a multiplier of its own.
        lagrange: learn the trust region's multiplier; otherwise it stays at `alpha`.
        alpha: the fixed multiplier when `lagrange` is off, > 0; a learned one starts at `exp(1)`.
        constraints: further ones, each a mapping with the arguments of `Constraint`.

    Raises:
        UserError: for an impossible constraint, or two of one kind.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Sequence[int] = (512, 512, 512, 512),
        activation: Activation = "gelu",
        trust_region: float | Sequence[float] = 0.001,
        lagrange: bool = True,
        alpha: float = 10.0,
        constraints: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.net = MLP(spec.observation_dim + spec.action_dim, hidden, spec.action_dim, activation)
        first = {"kind": "trust_region", "limit": trust_region, "multiplier": None if lagrange else alpha}
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
    ) -> tuple[Tensor, Metrics]:
        """The refinement loss plus the multipliers'.

        Args:
            batch: transitions.
            base_actions: proposals, shape (batch, action_dim), in [-1, 1].
            next_actions: the policy's actions at `s'`, shape (batch, action_dim), without gradient.
            values: `values(s, a)` of shape (members, batch) with a gradient into `a` only.
        """
        residual = self.residual(batch.observations, base_actions)
        actions = (base_actions + residual).clamp(-1.0, 1.0)

        # Value term, normalised by a statistic of the whole batch (of all ranks).
        q = values(batch.observations, actions).mean(0)
        q_scale = mean_over_ranks(q.detach().abs().mean())
        value_loss = -q.mean() / q_scale

        # Trust region and whatever else is constrained.
        loss = value_loss
        metrics = {"value_loss": value_loss.detach(), "q": q.detach().mean()}
        refinement = Refinement(residual, actions, batch.actions, next_actions)
        for kind, constraint in self.constraints.items():
            penalty, multiplier_loss, values_of_it = cast(Constraint, constraint).loss(refinement)
            loss = loss + penalty + multiplier_loss
            metrics |= {f"{kind}/{name}": value for name, value in values_of_it.items()}
        return loss, metrics | {"loss": loss.detach()}

    def residual(self, observations: Tensor, base_actions: Tensor) -> Tensor:
        """The residual `da`, shape (batch, action_dim)."""
        return self.net(torch.cat([observations, base_actions], dim=-1))

    def refine(self, observations: Tensor, base_actions: Tensor) -> Tensor:
        """The refined actions, clipped to [-1, 1], shape (batch, action_dim)."""
        return (base_actions + self.residual(observations, base_actions)).clamp(-1.0, 1.0)
