"""GaussianPolicy: imitation by maximum likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Positive, Rate, Widths
from deflow.types import Metrics, Spec

LOG_STD_RANGE = (-5.0, 2.0)  # of a learned deviation


class GaussianPolicy(LightningModule):
    r"""Policy :math:`\pi(a \mid s) = N(\mu(s), \sigma^2)`, its actions clipped to [-1, 1].

    .. math:: L(\phi) = -E\,w \log \pi_\phi(a \mid s)

    With a fixed deviation and without weights this is the squared error. Source: FQL's code (arXiv 2502.02538) for its
    Gaussian baselines, whose deviation is 1.

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        std: sigma, > 0, the same in every dimension; None learns one for each, from 1, between exp(-5) and exp(2).
        squash: let the mean be a tanh.
        dropout: share of the hidden values that an update leaves out, in [0, 1).
        output_scale: factor on the variance from which the last kernel is drawn, > 0; 1 draws it as the others.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        std: Positive | None = 1.0,
        squash: bool = False,
        dropout: Rate = 0.0,
        output_scale: Positive = 0.01,
    ) -> None:
        super().__init__()
        self.net = MLP(make_encoder(spec, activation, encoder), 0, hidden, spec.action_dim, activation, dropout)
        self.net.scale_output(output_scale)
        self.squash = squash
        if std is None:
            self.log_std = nn.Parameter(torch.zeros(spec.action_dim))
        else:
            self.register_buffer("log_std", torch.full((spec.action_dim,), math.log(std)), persistent=False)

    def loss(
        self, observations: Tensor, actions: Tensor, keep: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Negative log-likelihood.

        Args:
            observations: shape (batch, *observation_shape).
            actions: the data's, shape (batch, action_dim).
            keep: what dropout leaves in, see `Dropout`.
            weights: of the transitions, without gradient, shape (batch,); all 1 unless given.
        """
        mean = self.mean(observations, keep)
        log_probabilities = self.log_probabilities(mean, actions)
        loss = -(log_probabilities if weights is None else weights * log_probabilities).mean()
        squared_error = (mean.detach() - actions).square().mean()
        return loss, {"loss": loss.detach(), "squared_error": squared_error, "std": self.std.detach().mean()}

    def mean(self, observations: Tensor, keep: Tensor | None = None) -> Tensor:
        """mu, shape (batch, action_dim), not clipped."""
        mean = self.net(observations, keep=keep)
        return mean.tanh() if self.squash else mean

    def log_probabilities(self, mean: Tensor, actions: Tensor) -> Tensor:
        """Log densities of actions around `mean`, summed over the dimensions, shape (batch,)."""
        standard = (actions - mean) / self.std
        return (-0.5 * standard.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def mode(self, observations: Tensor) -> Tensor:
        """The likeliest actions, shape (batch, action_dim)."""
        return self.mean(observations).clamp(-1.0, 1.0)

    def sample(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions from standard normal noise `z`, both of shape (batch, action_dim)."""
        return (self.mean(observations) + self.std * z).clamp(-1.0, 1.0)

    @property
    def std(self) -> Tensor:
        """sigma, shape (action_dim,)."""
        learned = isinstance(self.log_std, nn.Parameter)
        return (self.log_std.clamp(*LOG_STD_RANGE) if learned else self.log_std).exp()
