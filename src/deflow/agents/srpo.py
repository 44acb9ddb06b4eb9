"""SRPO: a deterministic policy that climbs the value while a diffusion model's score holds it near the data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss
from deflow.agents.base import ALMOST_0, UNNAMED
from deflow.agents.implicit import ImplicitQ
from deflow.agents.panels import Panel, loss_panel
from deflow.modules.critic import Critic, value_gradient
from deflow.modules.diffusion import ScoreModel
from deflow.modules.value import Value
from deflow.nets.encoder import make_encoder
from deflow.nets.mlp import MLP
from deflow.ranges import Activation, Positive, Seed, Widths
from deflow.types import Batch, Metrics, Spec

log = logging.getLogger(__name__)

TIMES = (0.02, 0.98)  # of the score that the policy hears; near the ends it says little


class ScoreNoise(NamedTuple):
    """Every random number of an update."""

    behavior_times: Tensor  # see `ScoreModel.draw_times`
    behavior_z: Tensor  # of the behaviour's loss, standard normal, shape (batch, action_dim)
    keep: Tensor | None  # what dropout leaves in there, see `Dropout`
    times: Tensor  # of the score that the policy hears, uniform between `TIMES`, shape (batch, 1)
    z: Tensor  # of that score, standard normal, shape (batch, action_dim)


class ScoreActor(LightningModule):
    r"""Deterministic policy :math:`\pi(s) = \tanh \mu(s)`.

    .. math::
        L(\phi) = E\,[\sigma_t^2 \; sg[\epsilon_\psi(s, \alpha_t \pi(s) + \sigma_t z, t) - z] \cdot \pi(s)
            - \beta \, sg[g] \cdot \pi(s)], \quad g = \nabla_a \mathrm{mean}_k \bar Q_k(s, \pi(s))

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        beta: weight of the value against the score, > 0; the papers tune it for each task.
        normalise: whether g is divided by its root mean square over the action's dimensions.
        baseline: whether z is taken from the predicted noise, as above. It is 0 on average, so the expected loss and
            gradient are the same without it, but most of the prediction is z again: the gradient varies far more.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (256, 256),
        activation: Activation = "relu",
        encoder: Mapping[str, Any] | None = None,
        beta: Positive = 0.1,
        normalise: bool = False,
        baseline: bool = True,
    ) -> None:
        super().__init__()
        self.net = MLP(make_encoder(spec, activation, encoder), 0, hidden, spec.action_dim, activation)
        self.beta, self.normalise, self.baseline = beta, normalise, baseline

    def forward(self, observations: Tensor) -> Tensor:
        """Actions in (-1, 1), shape (batch, action_dim)."""
        return self.net(observations).tanh()

    def loss(
        self,
        observations: Tensor,
        times: Tensor,
        z: Tensor,
        behavior: ScoreModel,
        values: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Metrics]:
        """Score and value.

        Args:
            observations: shape (batch, *observation_shape).
            times: of the score, shape (batch, 1).
            z: standard normal noise, shape (batch, action_dim).
            behavior: whose score it is.
            values: `values(s, a)` of shape (members, batch) with a gradient into `a`.
        """
        actions = self(observations)
        fixed = actions.detach()

        # Score: where the data are, seen through noise.
        signal, sigma = behavior.levels(times)
        noise = behavior.noise(observations, signal * fixed + sigma * z, times)
        if self.baseline:
            noise = noise - z
        score_loss = (sigma.square() * noise * actions).sum(-1).mean()

        # Value: uphill from the policy's action.
        uphill, q = value_gradient(lambda states, actions: values(states, actions).mean(0), observations, fixed)
        if self.normalise:
            uphill = uphill / (uphill.square().mean(-1, keepdim=True).sqrt() + ALMOST_0)  # where the value is flat
        loss = score_loss - self.beta * (uphill * actions).sum(-1).mean()
        return loss, {"loss": loss.detach(), "score_loss": score_loss.detach(), "q": q.mean()}


class SRPO(ImplicitQ):
    r"""Score-regularised policy optimisation (arXiv 2310.07297).

    .. math::
        \min_\psi &\; E\|\epsilon_\psi(s, \alpha_t a + \sigma_t z, t) - z\|^2 \\
        \min_\eta &\; E\,L^2_\kappa(\min_k \bar Q_k(s, a) - V_\eta(s)) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m V_\eta(s'))^2

    and the policy's loss, see `ScoreActor`. `stages=srpo` trains behaviour, values and policy one after the other, as
    the original does.

    Differences from the released code:
    1. The score's noise is less z, as in the paper; there not by default ("VDS"), which is
       `agent.actor.baseline=false`.
    2. Targets move toward the weights of before the step (there after it), as everywhere here.
    3. No second policy is trained beside the critic, which there is only looked at.
    4. Kernels are drawn by Xavier's uniform distribution, biases are 0, as in the code behind most of the tables' cells
       (FQL's authors wrote it anew on IDQL's); there by torch's own rule, with a third of the variance.

    Args:
        spec: sizes of the task.
        behavior: makes the ScoreModel.
        critic: makes the Critic.
        value: makes the Value.
        actor: makes the ScoreActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
    """

    behavior: ScoreModel
    actor: ScoreActor
    traits = ImplicitQ.traits._replace(never_acts=("behavior",), own_stages="srpo")
    headline = MappingProxyType({"behavior": "behavior/loss", "critic": "critic/loss", "q": "actor/q"})

    def __init__(
        self,
        spec: Spec,
        behavior: Callable[[Spec], ScoreModel],
        critic: Callable[[Spec], Critic],
        value: Callable[[Spec], Value],
        actor: Callable[[Spec], ScoreActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
    ) -> None:
        parts = {"behavior": behavior(spec), "critic": critic(spec), "value": value(spec), "actor": actor(spec)}
        super().__init__(spec, parts, optimizer, seed)
        self.require_ensemble()

    def begin_stage(self, name: str, *settings: Any, **more: Any) -> None:
        super().begin_stage(name, *settings, **more)
        together = self.trains("actor") and self.trains("behavior")
        if together and name != UNNAMED and not next(self.parameters()).is_meta:  # there stages are only tried
            log.warning("stage '%s' trains SRPO's policy beside what it learns from: stages=srpo does it after", name)

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> ScoreNoise:
        rows, actions = len(batch.actions), batch.actions
        behavior_z, z = torch.randn(2, *actions.shape, generator=generator, device=actions.device)
        keep = self.behavior.net.body.dropout.draw(rows, generator)
        first, last = TIMES
        times = first + (last - first) * torch.rand(rows, 1, generator=generator, device=actions.device)
        return ScoreNoise(self.behavior.draw_times(rows, generator), behavior_z, keep, times, z)

    def losses(self, batch: Batch, noise: ScoreNoise) -> Iterator[Loss]:
        # Behaviour: denoise the data's actions.
        if self.trains("behavior"):
            yield "behavior", *self.behavior.loss(batch, noise.behavior_times, noise.behavior_z, noise.keep)

        # Critic and value: from the data's actions alone.
        yield from self.value_losses(batch)

        # Policy: along the score and uphill.
        if self.trains("actor"):
            heard = noise.times, noise.z, self.behavior, self.critic.target_values
            yield "actor", *self.actor.loss(batch.observations, *heard)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor(observations)

    def panels(self) -> list[Panel]:
        terms = {"train/actor/score_loss": "score", "train/actor/q": "Q(s, policy)"}
        return [loss_panel("behavior"), loss_panel("actor"), Panel("terms", terms), *self.value_panels()]
