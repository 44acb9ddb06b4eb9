"""IDQL: clone behaviour with a diffusion model, value it implicitly, act with the best of many samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import take_best
from deflow.agents.algorithm import Loss
from deflow.agents.implicit import ImplicitQ
from deflow.agents.panels import Panel, loss_panel
from deflow.modules.critic import Critic
from deflow.modules.diffusion import DenoisingDiffusion
from deflow.modules.value import Value
from deflow.ranges import Count, Seed, Share
from deflow.types import Batch, Spec


class DiffusionNoise(NamedTuple):
    """Every random number of an update."""

    times: Tensor  # see `BehaviorDiffusion.draw_times`
    z: Tensor  # standard normal, shape (batch, action_dim)
    keep: Tensor | None  # what dropout leaves in, see `Dropout`


class IDQL(ImplicitQ):
    r"""Implicit diffusion Q-learning (arXiv 2304.10573).

    .. math::
        \min_\psi &\; E\|\epsilon_\psi(s, \alpha_t a + \sigma_t z, t) - z\|^2 \\
        \min_\eta &\; E\,L^2_\kappa(\min_k \bar Q_k(s, a) - V_\eta(s)) \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m V_\eta(s'))^2 \\
        a &= \arg\max_{i \le N} \min_k \bar Q_k(s, a_i), \quad a_i \sim \bar\psi(s)

    with samples of the diffusion model whose weights are an average of those that train.

    Differences from the released code:
    1. The critic bootstraps from the value of before its step (there after it), and targets and average move toward the
       weights of before the step (there after it), as everywhere here.
    2. Critic and value learn in every second update, as the papers count them (in the released loop in each).

    Args:
        spec: sizes of the task.
        behavior: makes the DenoisingDiffusion.
        critic: makes the Critic.
        value: makes the Value.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        best_of_n: N, samples scored for each action taken.
        value_share: share of a batch that critic and value learn from, in (0, 1]; half of 512 in the papers.
        every: rhythm of the parts.
    """

    behavior: DenoisingDiffusion

    def __init__(
        self,
        spec: Spec,
        behavior: Callable[[Spec], DenoisingDiffusion],
        critic: Callable[[Spec], Critic],
        value: Callable[[Spec], Value],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        best_of_n: Count = 32,
        value_share: Share = 1.0,
        every: Mapping[str, Count] = MappingProxyType({"critic": 2, "value": 2}),
    ) -> None:
        parts = {"behavior": behavior(spec), "critic": critic(spec), "value": value(spec)}
        super().__init__(spec, parts, optimizer, seed, every)
        self.require_ensemble()
        self.best_of_n, self.value_share = best_of_n, value_share

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> DiffusionNoise:
        rows, actions = len(batch.actions), batch.actions
        times = self.behavior.draw_times(rows, generator)
        z = torch.randn(actions.shape, generator=generator, device=actions.device)
        return DiffusionNoise(times, z, self.behavior.net.body.dropout.draw(rows, generator))

    def losses(self, batch: Batch, noise: DiffusionNoise) -> Iterator[Loss]:
        # Behaviour: denoise the data's actions.
        if self.trains("behavior"):
            yield "behavior", *self.behavior.loss(batch, *noise)

        # Critic and value: from the data's actions alone.
        yield from self.value_losses(spread(batch, self.value_share))

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        return (self.behavior.steps, self.best_of_n, self.spec.action_dim)

    def propose(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior.sample(observations, z[:, :, 0].movedim(0, 1))

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        batch, _, candidates, action_dim = z.shape
        actions = self.behavior.sample(observations, z.movedim(0, 1).flatten(1, 2))
        values = self.critic.target_values(observations, actions).amin(0)
        return take_best(actions.reshape(batch, candidates, action_dim), values.reshape(batch, candidates))

    def panels(self) -> list[Panel]:
        return [loss_panel("behavior"), *self.value_panels()]


def spread(batch: Batch, share: float) -> Batch:
    """Such a share of a batch's transitions, evenly spread over it, as online the data's come before the new ones."""
    rows = len(batch.rewards)
    count = max(1, round(share * rows))
    if count == rows:
        return batch
    chosen = torch.arange(count, device=batch.rewards.device) * rows // count
    return Batch(*(None if column is None else column[chosen] for column in batch))  # type: ignore[arg-type]
