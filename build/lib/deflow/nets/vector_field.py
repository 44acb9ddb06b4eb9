"""The velocity network of a flow over actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deflow.nets.encoder import Encoder, beside
from deflow.nets.mlp import MLP
from deflow.ranges import Activation


class VectorField(nn.Module):
    """Velocity `v(s, x, t)`: an MLP over the concatenated features of the observation, point and time."""

    def __init__(
        self, encoder: Encoder, action_dim: int, hidden: Sequence[int], activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.mlp = MLP(encoder, action_dim + 1, hidden, action_dim, activation)

    def encode(self, observations: Tensor) -> Tensor:
        """Features of observations: they do not change along a path."""
        return self.mlp.encoder(observations)

    def forward(self, features: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """Velocities, shape (batch, action_dim).

        Args:
            features: of the observations, from `encode`.
            x_t: points on the path, shape (batch, action_dim).
            times: in [0, 1], shape (batch, 1).
        """
        return self.mlp.head(beside(features, x_t, times))

    def cast(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The same velocities computed in `dtype`, without gradient; see `MLP.cast`."""
        head = self.mlp.cast(dtype)
        return lambda features, x_t, times: head(beside(features, x_t, times))
