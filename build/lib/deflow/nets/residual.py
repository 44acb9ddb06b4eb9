"""Residual networks with layer normalisation, which diffusion models over actions use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deflow.nets.activation import activate
from deflow.nets.dropout import Dropout
from deflow.nets.encoder import Encoder, repeat_to
from deflow.nets.mlp import LAYER_NORM_EPS, at_least_float32, linear
from deflow.nets.time_features import FourierFeatures
from deflow.ranges import Activation

WIDER = 4  # times the width inside a block


class ResidualMLP(nn.Module):
    """A linear layer, blocks `h + two(act(one(norm(dropout(h)))))`, and after an activation another linear layer.

    Source: the LN-ResNet of IDQL (arXiv 2304.10573).

    Args:
        in_dim: width of the input.
        width: of the hidden layers; four times that inside the blocks.
        blocks: how many there are.
        out_dim: width of the output.
        activation: see `activate`.
        dropout: share of a block's input that an update leaves out, in [0, 1).
        norm_eps: of the layer normalisation.
    """

    def __init__(
        self,
        in_dim: int,
        width: int,
        blocks: int,
        out_dim: int,
        activation: Activation,
        dropout: float = 0.0,
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.first, self.last = linear(in_dim, width), linear(width, out_dim)
        self.ones = nn.ModuleList(linear(width, WIDER * width) for _ in range(blocks))
        self.twos = nn.ModuleList(linear(WIDER * width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width, norm_eps) for _ in range(blocks))
        self.activation: Activation = activation
        self.dropout = Dropout(blocks * width, dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Shape (batch, in_dim) -> (batch, out_dim); `keep` is what dropout leaves in, None everything."""
        h = self.first(x)
        kept = [None] * len(self.norms) if keep is None else keep.chunk(len(self.norms), dim=-1)
        for one, two, norm, of_block in zip(self.ones, self.twos, self.norms, kept, strict=True):
            h = h + two(activate(one(norm(self.dropout(h, of_block))), self.activation))
        return at_least_float32(self.last(activate(h, self.activation)))


class NoisePredictor(nn.Module):
    """`eps(s, x, t)`: the noise in a noisy action, from it, the observation and features of the time.

    Args:
        encoder: of the observation.
        action_dim: width of an action.
        width: of the residual network.
        blocks: of the residual network.
        time_features: of a time, an even number.
        condition: width of the two layers behind these features.
        activation: see `activate`.
        dropout: see `ResidualMLP`.
        frequency_scale: standard deviation of the time's frequencies at the start.
        learned_frequencies: whether these train.
        norm_eps: of the layer normalisation.
    """

    def __init__(
        self,
        encoder: Encoder,
        action_dim: int,
        width: int,
        blocks: int,
        time_features: int,
        condition: int,
        activation: Activation,
        dropout: float = 0.0,
        frequency_scale: float = 0.2,
        learned_frequencies: bool = True,
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.time = FourierFeatures(time_features, frequency_scale, learned_frequencies)
        self.condition = nn.ModuleList([linear(time_features, condition), linear(condition, condition)])
        in_dim = action_dim + encoder.width + condition
        self.body = ResidualMLP(in_dim, width, blocks, action_dim, activation, dropout, norm_eps)
        self.activation: Activation = activation

    def encode(self, observations: Tensor) -> Tensor:
        """Features of observations: they do not change along a chain of denoising steps."""
        return self.encoder(observations)

    def forward(self, features: Tensor, x: Tensor, times: Tensor, keep: Tensor | None = None) -> Tensor:
        """The noise, shape (batch, action_dim).

        Args:
            features: of the observations, from `encode`; each row serves equally many consecutive ones of `x`.
            x: noisy actions, shape (batch, action_dim).
            times: shape (batch, 1).
            keep: see `ResidualMLP`.
        """
        first, second = self.condition
        condition = second(activate(first(self.time(times)), self.activation))
        return self.body(torch.cat([x, repeat_to(features, len(x)), condition], dim=-1), keep)
