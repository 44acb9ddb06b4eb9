"""Refiner: a residual that moves a proposal toward value inside a trust region."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning import LightningModule
from torch import Tensor, nn

from deflow.distributed import mean_over_ranks
from deflow.errors import UserError
from deflow.nets.mlp import MLP, Activation
from deflow.types import Metrics, Spec


class Refiner(LightningModule):
    r"""Residual :math:`f_\phi(s, a_{base})` with :math:`a_\pi = clip(a_{base} + \Delta a)`, :math:`\Delta a = f_\phi`.

    .. math::
        L(\phi) = -\frac{E[\bar Q(s, a_\pi)]}{sg[E|\bar Q|]} + sg[\alpha] \, \|\Delta a\|^2, \qquad
        L(\alpha) = -\log\alpha \, (sg[\|\Delta a\|^2] - \delta)

    with :math:`\bar Q` the mean over the ensemble and :math:`\|\Delta a\|^2` the mean over batch and dimensions.
    The second loss makes :math:`\alpha` the Lagrange multiplier of :math:`\|\Delta a\|^2 \le \delta`.
    Source: DeFlow (arXiv 2601.10471). Difference from the released code: a fixed alpha multiplies the penalty
    once (there it does twice).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: `gelu` (exact) or `gelu_tanh`.
        delta: limit of the mean squared residual, in squared action units, > 0.
        lagrange: learn the multiplier; otherwise `alpha` stays as given.
        alpha: the fixed multiplier when `lagrange` is off, > 0; a learned one starts at `exp(1)`.
    """

    log_alpha: Tensor

    def __init__(
        self,
        spec: Spec,
        hidden: Sequence[int] = (512, 512, 512, 512),
        activation: Activation = "gelu",
        delta: float = 0.001,
        lagrange: bool = True,
        alpha: float = 10.0,
    ) -> None:
        super().__init__()
        if delta <= 0:
            raise UserError(f"agent.refiner.delta must be > 0, got {delta}")
        if alpha <= 0:
            raise UserError(f"agent.refiner.alpha must be > 0, got {alpha}")
        self.net = MLP(spec.observation_dim + spec.action_dim, hidden, spec.action_dim, activation)
        if lagrange:
            self.log_alpha = nn.Parameter(torch.tensor(1.0))
        else:
            self.register_buffer("log_alpha", torch.tensor(float(alpha)).log())
        self.delta = delta
        self.lagrange = lagrange

    def loss(
        self, observations: Tensor, base_actions: Tensor, values: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Metrics]:
        """The refinement loss plus, if learned, the multiplier's.

        Args:
            observations: shape (batch, observation_dim).
            base_actions: proposals, shape (batch, action_dim), in [-1, 1].
            values: `values(s, a)` of shape (members, batch) with a gradient into `a` only.
        """
        residual = self.residual(observations, base_actions)
        squared_residual = residual.square().mean()

        # Value term, normalised by a statistic of the whole batch (of all ranks).
        q = values(observations, (base_actions + residual).clamp(-1.0, 1.0)).mean(0)
        q_scale = mean_over_ranks(q.detach().abs().mean())
        value_loss = -q.mean() / q_scale

        # Trust region.
        alpha = self.log_alpha.detach().exp()
        penalty = alpha * squared_residual
        alpha_loss = -self.log_alpha * (squared_residual.detach() - self.delta)

        loss = value_loss + penalty + (alpha_loss if self.lagrange else 0.0)
        return loss, {
            "loss": (value_loss + penalty).detach(),
            "value_loss": value_loss.detach(),
            "alpha_loss": alpha_loss.detach(),
            "squared_residual": squared_residual.detach(),
            "alpha": alpha,
            "q": q.detach().mean(),
        }

    def residual(self, observations: Tensor, base_actions: Tensor) -> Tensor:
        """The residual `da`, shape (batch, action_dim)."""
        return self.net(torch.cat([observations, base_actions], dim=-1))

    def refine(self, observations: Tensor, base_actions: Tensor) -> Tensor:
        """The refined actions, clipped to [-1, 1], shape (batch, action_dim)."""
        return (base_actions + self.residual(observations, base_actions)).clamp(-1.0, 1.0)
