"""The velocity network of a flow over actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deflow.nets.mlp import MLP, Activation


class VectorField(nn.Module):
    """Velocity `v(s, x, t)`: an MLP over the concatenated observation, point and time."""

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int], activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.mlp = MLP(observation_dim + action_dim + 1, hidden, action_dim, activation)

    def forward(self, observations: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
        """Velocities, shape (batch, action_dim).

        Args:
            observations: shape (batch, observation_dim).
            x_t: points on the path, shape (batch, action_dim).
            times: in [0, 1], shape (batch, 1).
        """
        return self.mlp(torch.cat([observations, x_t, times], dim=-1))

    def cast(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The same velocities computed in `dtype`, without gradient; see `MLP.cast`."""
        mlp = self.mlp.cast(dtype)
        return lambda observations, x_t, times: mlp(torch.cat([observations, x_t, times], dim=-1))
