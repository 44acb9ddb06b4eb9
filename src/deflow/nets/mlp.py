"""Multi-layer perceptrons, single and stacked, initialised as in the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow.nets.activation import activate
from deflow.nets.dropout import Dropout
from deflow.nets.encoder import Encoder, beside
from deflow.ranges import Activation, Norm

# Flax's default, with which the published results were made (torch's own is 1e-5).
LAYER_NORM_EPS = 1e-6


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32, whatever the layers were."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer, its kernel drawn by Xavier's uniform distribution and its bias 0."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """`[Linear, activation] * len(hidden) + Linear` over the encoded observation and what is put beside it.

    Kernels are drawn by variance scaling (1, fan_avg, uniform), which is Xavier's uniform; biases are 0.

    Args:
        encoder: of the observation.
        more_dim: width of what is put beside the features.
        hidden: widths of the hidden layers.
        out_dim: width of the output.
        activation: see `activate`.
        dropout: share of the hidden layers' values that an update leaves out.
    """

    def __init__(
        self,
        encoder: Encoder,
        more_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        activation: Activation = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.hidden, self.dropout = tuple(hidden), Dropout(sum(hidden), dropout)
        widths = [encoder.width + more_dim, *hidden, out_dim]
        self.layers = nn.ModuleList(linear(i, o) for i, o in pairwise(widths))
        self.activation: Activation = activation

    def forward(self, observations: Tensor, *more: Tensor, keep: Tensor | None = None) -> Tensor:
        """Shape (batch, out_dim), of observations and what is beside them, see `beside`.

        Args:
            observations: shape (batch, *observation_shape).
            more: what is put beside their features, each of shape (batch, width).
            keep: what dropout leaves in, see `Dropout`; None drops nothing.
        """
        return self.head(beside(self.encoder(observations), *more), keep)

    def head(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The output for features and what is beside them, already put together; otherwise as `forward`."""
        kept = [None] * len(self.hidden) if keep is None else keep.split(self.hidden, dim=-1)
        for layer, of_layer in zip(self.layers[:-1], kept, strict=True):
            x = self.dropout(activate(layer(x), self.activation), of_layer)
        return at_least_float32(self.layers[-1](x))

    @torch.no_grad()
    def scale_output(self, scale: float) -> None:
        """Multiply the variance of the last kernel, so that a policy begins with small actions."""
        cast(nn.Linear, self.layers[-1]).weight.mul_(math.sqrt(scale))

    def cast(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """`head` computed in `dtype`, its weights converted once; without gradient."""
        linears = cast(Iterable[nn.Linear], self.layers)
        layers = [(linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)) for linear in linears]

        def forward(x: Tensor) -> Tensor:
            x = x.to(dtype)
            for weight, bias in layers[:-1]:
                x = activate(F.linear(x, weight, bias), self.activation)
            return at_least_float32(F.linear(x, *layers[-1]))

        return forward


class EnsembleLinear(nn.Module):
    """`members` independent linear layers as one batched product: (members, batch, in) -> (members, batch, out)."""

    def __init__(self, members: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (in_dim + out_dim))
        self.weight = nn.Parameter(torch.empty(members, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation over the last axis, with a scale and a shift for each member."""

    def __init__(self, members: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, dim))
        self.bias = nn.Parameter(torch.zeros(members, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        # In the type of `x`: under autocast a float32 scale would turn the next product's input into float32 and back.
        normalised = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self.bias.to(x.dtype), normalised, self.weight.to(x.dtype))


class EnsembleMLP(nn.Module):
    """`members` MLPs of one shape behind one encoder, see `MLP`.

    Args:
        members: size of the ensemble.
        encoder: of the observation.
        more_dim: width of what is put beside the features.
        hidden: widths of the hidden layers.
        out_dim: width of the output.
        activation: see `activate`.
        norm: layer normalisation of every `hidden` activation after the non-linearity, as in the papers' critics; of
            the `input`; or `none`.
    """

    def __init__(
        self,
        members: int,
        encoder: Encoder,
        more_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        activation: Activation = "gelu",
        norm: Norm = "hidden",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        widths = [encoder.width + more_dim, *hidden, out_dim]
        self.members = members
        self.activation: Activation = activation
        self.norm: Norm = norm
        self.layers = nn.ModuleList(EnsembleLinear(members, i, o) for i, o in pairwise(widths))
        normalised = {"hidden": hidden, "input": widths[:1], "none": []}[norm]
        self.norms = nn.ModuleList(EnsembleLayerNorm(members, width) for width in normalised)

    def forward(self, observations: Tensor, *more: Tensor) -> Tensor:
        """Shape (members, batch, out_dim), of observations and what is beside them, see `beside`."""
        return self.head(beside(self.encoder(observations), *more))

    def head(self, x: Tensor) -> Tensor:
        """As `forward`, from features and what is beside them, put together: for all members, or for each its own."""
        x = x.expand(self.members, *x.shape[-2:])
        if self.norm == "input":
            x = self.norms[0](x)
        for number, layer in enumerate(self.layers[:-1]):
            x = activate(layer(x), self.activation)
            if self.norm == "hidden":
                x = self.norms[number](x)
        return at_least_float32(self.layers[-1](x))
