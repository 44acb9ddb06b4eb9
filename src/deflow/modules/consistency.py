"""ConsistencyPolicy: a model that takes noise of any level back to an action in one step, or in a few."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from deflow.nets.activation import activate
from deflow.nets.average import polyak_pairs
from deflow.nets.encoder import Encoder, make_encoder, repeat_to
from deflow.nets.mlp import MLP, linear
from deflow.nets.time_features import sinusoidal
from deflow.ranges import Activation, Count, Pairs, Rate, Widths
from deflow.types import Batch, Spec

LOWEST, HIGHEST = 0.002, 80.0  # noise levels, in action units
LAST_STEP = 2.0  # noise level of the last of several sampling steps
SIGMA_DATA = 0.5  # the data's standard deviation, as the preconditioning assumes it
RHO = 7.0  # of Karras' boundaries between the levels
SCALE = 100.0  # of the loss, over the distance of two boundaries


class ConsistencyNet(nn.Module):
    """`F(s, x, t)`: an MLP over a noisy action, features of its noise level, and the observation."""

    def __init__(
        self, encoder: Encoder, action_dim: int, hidden: Widths, time_features: int, activation: Activation
    ) -> None:
        super().__init__()
        self.time_features = time_features
        self.time = nn.ModuleList([linear(time_features, 2 * time_features), linear(2 * time_features, time_features)])
        self.mlp = MLP(encoder, action_dim + time_features, hidden, action_dim, activation)
        self.activation: Activation = activation

    def encode(self, observations: Tensor) -> Tensor:
        """Features of observations: they do not change along a chain of steps."""
        return self.mlp.encoder(observations)

    def forward(self, features: Tensor, x: Tensor, levels: Tensor) -> Tensor:
        first, second = self.time
        of_level = second(activate(first(sinusoidal(levels, self.time_features)), self.activation))
        return self.mlp.head(torch.cat([x, of_level, repeat_to(features, len(x))], dim=-1))


class ConsistencyPolicy(LightningModule):
    r"""Actions :math:`f_\phi(s, x, t) = c_{skip}(t) x + c_{out}(t) F_\phi(s, x, t)` from noise of level t.

    .. math::
        L(\phi) &= E\,\frac{100}{t_{i+1} - t_i}
            \|f_\phi(s, a + t_{i+1} z, t_{i+1}) - f_{\bar\phi}(s, a + t_i z, t_i)\|^2 \\
        c_{skip} &= \frac{0.25}{(t - \epsilon)^2 + 0.25}, \quad c_{out} = \frac{0.5 (t - \epsilon)}{\sqrt{t^2 + 0.25}}

    averaged over the batch and the action dimensions; :math:`\bar\phi`, the teacher, is an average of the weights.
    Source: consistency models (arXiv 2303.01469), for actions consistency-AC (arXiv 2309.16984).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        time_features: of the noise level, an even number of at least 4.
        steps: in which an action is sampled: the first from the highest level, the last from 2.
        ema: share of itself that the teacher keeps whenever it moves, in [0, 1).
    """

    step_levels: Tensor

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (256, 256, 256),
        activation: Activation = "mish",
        encoder: Mapping[str, Any] | None = None,
        time_features: Pairs = 16,
        steps: Count = 2,
        ema: Rate = 0.995,
    ) -> None:
        super().__init__()
        of_observation = make_encoder(spec, activation, encoder)
        self.online = ConsistencyNet(of_observation, spec.action_dim, hidden, time_features, activation)
        self.teacher = copy.deepcopy(self.online).requires_grad_(False)
        self.steps, self.ema = steps, ema
        self.register_buffer("step_levels", torch.linspace(HIGHEST, LAST_STEP, steps), persistent=False)

    def consistency_loss(self, batch: Batch, z: Tensor, levels: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            batch: transitions; only observations and actions are read.
            z: standard normal noise, shape (batch, action_dim).
            levels: neighbouring boundaries, the lower one first, shape (batch, 2).
        """
        lower, upper = levels.chunk(2, dim=-1)
        with torch.no_grad():
            features = self.teacher.encode(batch.observations)
            target = self._denoise(self.teacher, features, batch.actions + lower * z, lower)
        features = self.online.encode(batch.observations)
        denoised = self._denoise(self.online, features, batch.actions + upper * z, upper)
        return (SCALE / (upper - lower) * (denoised - target).square()).mean()

    def sample(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions in [-1, 1], shape (rows, action_dim), with a gradient through all steps.

        Args:
            observations: shape (batch, *observation_shape).
            z: standard normal noise of each step, shape (steps, rows, action_dim); there may be several consecutive
                rows for each observation.
        """
        return self._sample(self.online, observations, z)

    @torch.no_grad()
    def teacher_sample(self, observations: Tensor, z: Tensor) -> Tensor:
        """The teacher's actions, without gradient; otherwise as `sample`."""
        return self._sample(self.teacher, observations, z)

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, teacher, share)` for the agent's Polyak step."""
        return polyak_pairs(self.online, self.teacher, 1 - self.ema)

    def _sample(self, net: ConsistencyNet, observations: Tensor, z: Tensor) -> Tensor:
        features = net.encode(observations)
        x = self._denoise(net, features, HIGHEST * z[0], self.step_levels[0].expand(z.shape[1], 1))
        for level, noise in zip(self.step_levels[1:], z[1:], strict=True):
            noisy = x + (level.square() - LOWEST**2).sqrt() * noise
            x = self._denoise(net, features, noisy, level.expand(len(x), 1))
        return x.clamp(-1.0, 1.0)

    @staticmethod
    def _denoise(net: ConsistencyNet, features: Tensor, x: Tensor, levels: Tensor) -> Tensor:
        above, variance = levels - LOWEST, SIGMA_DATA**2
        skip = variance / (above.square() + variance)
        out = SIGMA_DATA * above / (levels.square() + variance).sqrt()
        return skip * x + out * net(features, x, levels)
