"""Diffusion models of the data's actions: in a few steps, to sample from, and in continuous time, for a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from deflow.flow.schedules import vp_betas, vp_levels
from deflow.nets.average import Average
from deflow.nets.encoder import make_encoder
from deflow.nets.residual import NoisePredictor
from deflow.ranges import Count, Pairs, Rate
from deflow.types import Batch, Metrics, Spec

EARLIEST = 1e-3  # time of a continuous model, below which there is next to no noise


class BehaviorDiffusion(LightningModule, ABC):
    r"""A network that predicts the noise in a noisy action of the data.

    .. math:: L(\psi) = E\,\|\epsilon_\psi(s, \alpha_t a + \sigma_t z, t) - z\|^2, \quad z \sim N(0, I)

    The norm is a sum over the action's dimensions. Subclasses say what the times are and :math:`\alpha_t, \sigma_t`.
    """

    def __init__(self, net: NoisePredictor, ema: float | None) -> None:
        super().__init__()
        self.net = net
        self.average = Average(net, ema)

    @abstractmethod
    def draw_times(self, rows: int, generator: torch.Generator) -> Tensor:
        """Times of so many transitions, shape (rows, 1)."""

    @abstractmethod
    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at the times, of their shape."""

    def loss(self, batch: Batch, times: Tensor, z: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The denoising loss.

        Args:
            batch: transitions; only observations and actions are read.
            times: from `draw_times`.
            z: standard normal noise, shape (batch, action_dim).
            keep: what dropout leaves in, see `Dropout`.
        """
        signal, sigma = self.levels(times)
        noisy = signal * batch.actions + sigma * z
        predicted = self.net(self.net.encode(batch.observations), noisy, times, keep)
        loss = (predicted - z).square().sum(-1).mean()
        return loss, {"loss": loss.detach()}

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, average, share)` for the agent's Polyak step."""
        yield from self.average.pairs(self.net)


class DenoisingDiffusion(BehaviorDiffusion):
    r"""Denoising diffusion in a few steps T (DDPM, arXiv 2006.11239) with the variance-preserving schedule.

    .. math::
        x_{t - 1} = clip((x_t - \beta_t / \sqrt{1 - \bar\alpha_t} \; \epsilon_\psi(s, x_t, t)) / \sqrt{1 - \beta_t}
            + 1[t > 0] \sqrt{\beta_t} z_t)

    Source: the actor of IDQL (arXiv 2304.10573).

    Args:
        spec: sizes of the task.
        width: of the residual network, see `ResidualMLP`.
        blocks: of the residual network.
        time_features: see `NoisePredictor`.
        condition: width of the layers behind these.
        dropout: share of the hidden values that an update leaves out, in [0, 1).
        encoder: settings of the image encoder, see `Impala`; not read for states.
        steps: T.
        ema: if given, an average of the weights that keeps this share of itself at every update, in [0, 1), is sampled
            from in evaluation mode.
    """

    betas: Tensor
    signals: Tensor

    def __init__(
        self,
        spec: Spec,
        width: Count = 256,
        blocks: Count = 3,
        time_features: Pairs = 64,
        condition: Count = 128,
        dropout: Rate = 0.1,
        encoder: Mapping[str, Any] | None = None,
        steps: Count = 5,
        ema: Rate | None = 0.999,
    ) -> None:
        of_observation = make_encoder(spec, "silu", encoder)
        sizes = width, blocks, time_features, condition
        net = NoisePredictor(of_observation, spec.action_dim, *sizes, "silu", dropout)
        super().__init__(net, ema)
        betas = vp_betas(steps)
        self.steps = steps
        self.register_buffer("betas", betas.float(), persistent=False)  # settings, not weights
        self.register_buffer("signals", (1 - betas).cumprod(0).float(), persistent=False)  # squared

    def draw_times(self, rows: int, generator: torch.Generator) -> Tensor:
        """Steps of the chain, 0 ... T - 1."""
        return torch.randint(self.steps, (rows, 1), generator=generator, device=generator.device)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        squared = self.signals[times]
        return squared.sqrt(), (1 - squared).sqrt()

    @torch.no_grad()
    def sample(self, observations: Tensor, z: Tensor) -> Tensor:
        """Actions in [-1, 1], shape (rows, action_dim), without gradient.

        Args:
            observations: shape (batch, *observation_shape).
            z: standard normal noise, shape (steps, rows, action_dim): where the chain begins, and of each step but the
                last. There may be several consecutive rows for each observation.
        """
        net = self.average.of(self.net)
        features = net.encode(observations)
        x = z[0]
        for number, step in enumerate(reversed(range(self.steps))):
            beta = self.betas[step]
            noise = net(features, x, torch.full_like(x[:, :1], step))
            x = (x - beta / (1 - self.signals[step]).sqrt() * noise) / (1 - beta).sqrt()
            if step > 0:
                x = x + beta.sqrt() * z[number + 1]
            x = x.clamp(-1.0, 1.0)
        return x


class ScoreModel(BehaviorDiffusion):
    r"""Diffusion in continuous time, the variance-preserving SDE (arXiv 2011.13456); its score is -noise / sigma.

    Source: the behaviour model of SRPO (arXiv 2310.07297).

    Args:
        spec: sizes of the task.
        width: of the residual network, see `ResidualMLP`.
        blocks: of the residual network.
        time_features: see `NoisePredictor`.
        condition: width of the layers behind these.
        dropout: share of the hidden values that an update leaves out, in [0, 1).
        encoder: settings of the image encoder, see `Impala`; not read for states.
        ema: if given, an average of the weights that keeps this share of itself at every update, in [0, 1), gives the
            score in evaluation mode, in which a frozen model is too.
    """

    def __init__(
        self,
        spec: Spec,
        width: Count = 256,
        blocks: Count = 3,
        time_features: Pairs = 64,
        condition: Count = 128,
        dropout: Rate = 0.1,
        encoder: Mapping[str, Any] | None = None,
        ema: Rate | None = None,
    ) -> None:
        net = NoisePredictor(
            make_encoder(spec, "mish", encoder),
            spec.action_dim,
            width,
            blocks,
            time_features,
            condition,
            "mish",
            dropout,
            frequency_scale=30.0,
            learned_frequencies=False,
            norm_eps=1e-5,
        )
        super().__init__(net, ema)

    def draw_times(self, rows: int, generator: torch.Generator) -> Tensor:
        """Uniform in [0.001, 1)."""
        return EARLIEST + (1 - EARLIEST) * torch.rand(rows, 1, generator=generator, device=generator.device)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        return vp_levels(times)

    @torch.no_grad()
    def noise(self, observations: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The predicted noise, of the shape of `noisy` (batch, action_dim); no dropout, no gradient."""
        net = self.average.of(self.net)
        return net(net.encode(observations), noisy, times)
