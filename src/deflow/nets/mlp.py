"""Multi-layer perceptrons, single and stacked, initialised as in the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh"]

# Flax's default, with which the published results were made (torch's own is 1e-5).
LAYER_NORM_EPS = 1e-6


def activate(x: Tensor, activation: Activation) -> Tensor:
    """GELU: exact (erf), or the tanh form of the original code, over four times dearer on a CPU and < 1e-3 away."""
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32, whatever the layers were."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MLP(nn.Module):
    """`[Linear, activation] * len(hidden) + Linear`, shape (batch, in_dim) -> (batch, out_dim).

    Kernels are drawn by variance scaling (1, fan_avg, uniform), which is Xavier's uniform; biases are 0.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, activation: Activation = "gelu") -> None:
        super().__init__()
        widths = [in_dim, *hidden, out_dim]
        layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = activate(layer(x), self.activation)
        return _at_least_float32(self.layers[-1](x))

    def cast(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The same function computed in `dtype`, its weights converted once; without gradient."""
        linears = cast(Iterable[nn.Linear], self.layers)
        layers = [(linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)) for linear in linears]

        def forward(x: Tensor) -> Tensor:
            x = x.to(dtype)
            for weight, bias in layers[:-1]:
                x = activate(F.linear(x, weight, bias), self.activation)
            return _at_least_float32(F.linear(x, *layers[-1]))

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
    """`members` MLPs of one shape: (batch, in_dim), or one input a member, -> (members, batch, out_dim).

    Every hidden activation is normalised after the non-linearity, as in the papers' critics.
    """

    def __init__(
        self, members: int, in_dim: int, hidden: Sequence[int], out_dim: int, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        widths = [in_dim, *hidden, out_dim]
        self.members = members
        self.activation: Activation = activation
        self.layers = nn.ModuleList(EnsembleLinear(members, i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(EnsembleLayerNorm(members, width) for width in hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.members, *x.shape[-2:])
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(activate(layer(x), self.activation))
        return _at_least_float32(self.layers[-1](x))
