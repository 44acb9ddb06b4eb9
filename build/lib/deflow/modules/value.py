"""State values of the data's actions: their mean, or one that leans toward the best of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import EnsembleMLP
from deflow.ranges import Activation, Expectile, Norm, Widths
from deflow.types import Metrics, Spec


class StateValue(LightningModule, ABC):
    """A network :math:`V(s)`; subclasses say what it learns.

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        norm: what is layer-normalised, see `EnsembleMLP`.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        norm: Norm = "hidden",
    ) -> None:
        super().__init__()
        self.net = EnsembleMLP(1, make_encoder(spec, activation, encoder), 0, hidden, 1, activation, norm)

    @abstractmethod
    def loss(self, observations: Tensor, target_values: Tensor) -> tuple[Tensor, Metrics]:
        """The regression.

        Args:
            observations: shape (batch, *observation_shape).
            target_values: of the data's actions by the target critics, shape (members, batch), without gradient.
        """

    def forward(self, observations: Tensor) -> Tensor:
        """Values, shape (batch,)."""
        return self.net(observations)[0, :, 0]


class Value(StateValue):
    r"""State value by expectile regression.

    .. math:: L(\eta) = E\,|\kappa - 1[u < 0]|\,u^2, \quad u = \min_k \bar Q_k(s, a) - V_\eta(s)

    Source: IQL (arXiv 2110.06169).

    Args:
        spec, hidden, activation, encoder, norm: see `StateValue`.
        expectile: kappa, in [0.5, 1); 0.5 is the mean.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        expectile: Expectile = 0.9,
        norm: Norm = "hidden",
    ) -> None:
        super().__init__(spec, hidden, activation, encoder, norm)
        self.expectile = expectile

    def loss(self, observations: Tensor, target_values: Tensor) -> tuple[Tensor, Metrics]:
        values = self(observations)
        error = target_values.amin(0) - values
        weight = torch.where(error < 0, 1 - self.expectile, self.expectile)
        loss = (weight * error.square()).mean()
        return loss, {"loss": loss.detach(), "v": values.detach().mean()}


class MeanValue(StateValue):
    r"""State value by plain regression, :math:`L(\eta) = E\,\mathrm{mean}_k (\bar Q_k(s, a) - V_\eta(s))^2`."""

    def loss(self, observations: Tensor, target_values: Tensor) -> tuple[Tensor, Metrics]:
        values = self(observations)
        loss = (target_values - values).square().mean()
        return loss, {"loss": loss.detach(), "v": values.detach().mean()}
