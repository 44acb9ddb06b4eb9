"""Limits on what the Refiner may do to a proposal, each with a Lagrange multiplier of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from deflow.errors import UserError
from deflow.modules.imagination import mean_that_counts
from deflow.ranges import Limit, Positive
from deflow.types import Metrics


class Refinement(NamedTuple):
    """A batch of refined actions and what they came from; each of shape (batch, action_dim)."""

    residual: Tensor  # what the refiner added to the proposal; of imagined steps too, as (steps, batch, action_dim)
    actions: Tensor  # the refined actions, clipped
    data_actions: Tensor  # the data's actions at the same states
    next_actions: Tensor  # the policy's actions at s', without gradient
    counts: Tensor | None = None  # (steps, batch), of the residual of several steps: 0 where the task had ended, else 1


# What a limit holds down: the mean square of one of these, over the batch and the action dimensions.
QUANTITIES: dict[str, Callable[[Refinement], Tensor]] = {
    "trust_region": lambda r: r.residual,
    "action_change": lambda r: r.next_actions - r.actions,  # from one step to the next
    "action_norm": lambda r: r.actions,
    "data_distance": lambda r: r.actions - r.data_actions,
}


class ConstraintSettings(TypedDict):
    """The arguments of a `Constraint`."""

    kind: str
    limit: Limit
    multiplier: NotRequired[Positive | None]


class Constraint(nn.Module):
    r"""The constraint :math:`C \le d` on a mean square :math:`C = E\,x^2`, with a learned multiplier.

    .. math:: L(\phi) = sg[\lambda]\, C, \qquad L(\lambda) = -\log\lambda \, (sg[C] - d)

    The second loss raises :math:`\lambda` while the constraint is violated and lowers it otherwise. With one limit a
    dimension, each dimension has a multiplier of its own and the first loss is the mean of their penalties. Over
    several steps the constraint is one of the step in which `C` is largest, and so of all of them; `C` is the mean over
    the rollouts in which the task still goes on.
    Source: DeFlow (arXiv 2601.10471) for the trust region.

    Args:
        kind: one of `QUANTITIES`.
        limit: d > 0 in squared action units, one number or one an action dimension.
        multiplier: keeps :math:`\lambda` fixed at this value > 0; None learns it, from exp(1).

    Raises:
        UserError: for an unknown kind.
    """

    log_multiplier: Tensor
    limit: Tensor

    def __init__(self, kind: str, limit: Limit, multiplier: Positive | None = None) -> None:
        super().__init__()
        if kind not in QUANTITIES:
            raise UserError(f"unknown constraint '{kind}': choose one of {', '.join(QUANTITIES)}")
        limits = torch.tensor(limit, dtype=torch.float32)
        self.quantity = QUANTITIES[kind]
        self.register_buffer("limit", limits, persistent=False)  # a setting, not a weight
        self.learned = multiplier is None
        if multiplier is None:
            self.log_multiplier = nn.Parameter(torch.ones_like(limits))
        else:
            self.register_buffer("log_multiplier", torch.full_like(limits, multiplier).log())

    def loss(self, refinement: Refinement) -> tuple[Tensor, Tensor, Metrics]:
        """The penalty, the multiplier's loss (0 if it is fixed) and the metrics, all scalar."""
        squares = self._squares(refinement)
        cost = squares.mean(-1) if self.limit.ndim == 0 else squares
        if squares.ndim > 1:
            cost = cost.amax(0)
        multiplier = self.log_multiplier.detach().exp()
        penalty = (multiplier * cost).mean()
        violation = cost.detach() - self.limit
        multiplier_loss = -(self.log_multiplier * violation).sum()
        metrics = {
            "cost": cost.detach().mean(),
            "violation": violation.amax(),
            "multiplier": multiplier.mean(),
            "multiplier_loss": multiplier_loss.detach(),
        }
        if self.limit.ndim:
            metrics |= {f"multiplier_{i}": value for i, value in enumerate(multiplier)}
        return penalty, multiplier_loss if self.learned else torch.zeros_like(penalty), metrics

    def _squares(self, refinement: Refinement) -> Tensor:
        """Mean squares over the batch, shape (action_dim,), or of several steps (steps, action_dim)."""
        squares = self.quantity(refinement).square()
        if squares.ndim == 2:
            return squares.mean(0)
        assert refinement.counts is not None
        return mean_that_counts(squares, refinement.counts)
