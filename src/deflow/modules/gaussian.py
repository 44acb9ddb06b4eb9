"""GaussianActor: a squashed Gaussian policy with a learned temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from deflow.errors import UserError
from deflow.nets.encoder import make_encoder, repeat_to
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Interval, Positive, ReadIf, Widths
from deflow.types import Metrics, Spec


class GaussianActor(LightningModule):
    r"""Policy :math:`a = \tanh(\mu(s) + \sigma(s) \, z)` that maximises value and entropy.

    .. math:: L(\phi) = E[\alpha \log \pi(a \mid s) - Q(s, a)], \quad
              L(\alpha) = \log\alpha \, (sg[H] - H_0), \quad H = -E \log \pi

    with :math:`Q` what `loss` is given, of the ensemble and not of its targets. The other form of the second loss is
    :math:`\alpha \, (sg[H] - H_0)`, whose gradient is that of the first times :math:`\alpha`. The temperature
    :math:`\alpha` falls while the entropy is above its target :math:`H_0` and rises otherwise. Source: SAC
    (arXiv 1812.05905).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        target_entropy: in nats; None is minus `target_entropy_multiplier` for each action dimension.
        temperature: alpha at the start, > 0.
        target_entropy_multiplier: 0.5 in RLPD's released code, 1 in Cal-QL's; > 0.
        log_std_range: lowest and highest logarithm of the standard deviation, to which what the network says is cut:
            [-5, 2] in FQL's code, [-20, 2] in RLPD's, Cal-QL's and QAM's.
        output_scale: factor on the variance from which the last kernel is drawn, > 0; 1 draws it as the others. 0.01 in
            FQL's code, where mean and deviation have a last layer each, which are drawn as this one but for the width
            of both.
        temperature_loss: what the entropy's error multiplies: `log_alpha` (Cal-QL's code), or `alpha` (RLPD's, FQL's).

    Raises:
        UserError: if the lowest logarithm is not below the highest.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        target_entropy: float | None = None,
        temperature: Positive = 1.0,
        target_entropy_multiplier: Annotated[Positive, ReadIf("target_entropy", None)] = 0.5,
        log_std_range: Interval = (-5.0, 2.0),
        output_scale: Positive = 1.0,
        temperature_loss: Literal["alpha", "log_alpha"] = "log_alpha",
    ) -> None:
        super().__init__()
        if not log_std_range[0] < log_std_range[1]:
            raise UserError(f"agent.actor.log_std_range must be [lowest, highest], got {list(log_std_range)}")
        self.net = MLP(make_encoder(spec, activation, encoder), 0, hidden, 2 * spec.action_dim, activation)
        self.net.scale_output(output_scale)
        self.log_std_range, self.temperature_loss = tuple(log_std_range), temperature_loss
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        expected = -target_entropy_multiplier * spec.action_dim
        self.target_entropy = expected if target_entropy is None else target_entropy

    def loss(
        self, observations: Tensor, z: Tensor, values: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Metrics]:
        """Value and entropy, and the temperature's loss.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, action_dim).
            values: `values(s, a)` of shape (members, batch) with a gradient into `a` only.
        """
        actions, log_probabilities = self.sample(observations, z)
        q = values(observations, actions).mean(0)
        policy_loss = (self.temperature.detach() * log_probabilities - q).mean()
        entropy = -log_probabilities.detach().mean()
        multiplied = self.temperature if self.temperature_loss == "alpha" else self.log_temperature
        temperature_loss = multiplied * (entropy - self.target_entropy)
        loss = policy_loss + temperature_loss
        return loss, {
            "loss": loss.detach(),
            "q": q.detach().mean(),
            "entropy": entropy,
            "temperature": self.temperature.detach(),
        }

    def mode(self, observations: Tensor) -> Tensor:
        """The mode before squashing, squashed: actions in (-1, 1), shape (batch, action_dim)."""
        mean, _ = self.net(observations).chunk(2, dim=-1)
        return mean.tanh()

    def sample(self, observations: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Actions in (-1, 1), shape (batch, action_dim), and their log densities, shape (batch,).

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, action_dim), or several consecutive rows for each observation.
        """
        mean, log_std = repeat_to(self.net(observations), len(z)).chunk(2, dim=-1)
        log_std = log_std.clamp(*self.log_std_range)
        before = mean + log_std.exp() * z
        gaussian = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(x)^2), without loss of digits.
        squashing = 2 * (math.log(2) - before - F.softplus(-2 * before))
        return before.tanh(), (gaussian - squashing).sum(-1)

    @property
    def temperature(self) -> Tensor:
        """alpha, a scalar."""
        return self.log_temperature.exp()
