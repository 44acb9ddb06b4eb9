"""RLPD: soft actor-critic from scratch, with half of every batch from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.errors import UserError
from deflow.modules.critic import Critic
from deflow.modules.gaussian import GaussianActor
from deflow.ranges import Count, Seed
from deflow.types import Batch, Spec


class SoftNoise(NamedTuple):
    """Every random number of an update."""

    z: Tensor  # of the policy at s, shape (batch, action_dim)
    z_next: Tensor  # of the policy at s', shape (batch, action_dim)
    members: Tensor  # of the ensemble in the target, shape (target_members,); all of them in any order


class RLPD(ActorCritic):
    r"""Online reinforcement learning with offline data (arXiv 2302.02948), for `stages=from_scratch`.

    .. math::
        y &= r + \gamma m (\mathrm{agg}_{k \in Z} \bar Q_k(s', a') - \alpha \log \pi(a' \mid s')) \\
        \min_\theta &\; E(Q_\theta(s, a) - y)^2 \\
        \max_\phi &\; E[\mathrm{mean}_k Q_k(s, a_\pi) - \rho \, \mathrm{std}_k Q_k(s, a_\pi)
            - \alpha \log \pi(a_\pi \mid s)]

    :math:`Z` is a random subset of the ensemble, drawn anew at every update, or all of it; critics have layer
    normalisation. It acts with the policy's mode and explores with actions drawn from it. FQL's `sac`, as `agent=rlpd`,
    and QAM's `rlpd` without cloning agree with it (`tests/parity/test_soft_parity.py`).

    Args:
        spec: sizes of the task.
        critic: makes the Critic.
        actor: makes the GaussianActor.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        target_members: size of the subset Z; None is the whole ensemble.
        entropy_backup: whether the target counts the next action's entropy, the last term of y.

    Raises:
        UserError: if the subset is not within the ensemble.
    """

    actor: GaussianActor
    traits = Traits(trains_jointly=True, learns_by_playing=True)

    def __init__(
        self,
        spec: Spec,
        critic: Callable[[Spec], Critic],
        actor: Callable[[Spec], GaussianActor],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        target_members: Count | None = None,
        entropy_backup: bool = False,
    ) -> None:
        super().__init__(spec, {"critic": critic(spec), "actor": actor(spec)}, optimizer, seed)
        self.require_ensemble()
        self.target_members, self.entropy_backup = target_members, entropy_backup
        members = self.critic.online.members
        if not 1 <= (target_members or members) <= members:
            raise UserError(f"agent.target_members must be 1 to agent.critic.members={members}, got {target_members}")

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> SoftNoise:
        shape, device = batch.actions.shape, batch.actions.device
        z, z_next = torch.randn(2, *shape, generator=generator, device=device)
        members = torch.randperm(self.critic.online.members, generator=generator, device=device)
        return SoftNoise(z, z_next, members[: self.target_members])

    def losses(self, batch: Batch, noise: SoftNoise) -> Iterator[Loss]:
        # Critic: a cautious soft value of the policy at s'.
        if self.trains("critic"):
            with torch.no_grad():
                next_actions, log_probabilities = self.actor.sample(batch.next_observations, noise.z_next)
                values = self.critic.target_values(batch.next_observations, next_actions)
                next_value = self.critic.aggregated(values.index_select(0, noise.members))
                if self.entropy_backup:
                    next_value = next_value - self.actor.temperature * log_probabilities
            yield "critic", *self.critic.loss_from(batch, next_value)

        # Actor: pathwise through Q, with entropy.
        if self.trains("actor"):
            yield "actor", *self.actor.loss(batch.observations, noise.z, self._lowered_value)

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.mode(observations)

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.actor.sample(observations, z)[0]

    def _lowered_value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic.lowered_mean(self.critic.frozen_values(observations, actions))[None]

    def panels(self) -> list[Panel]:
        soft = {"train/actor/entropy": "entropy", "train/actor/temperature": "temperature"}
        return [loss_panel("critic", log=True), loss_panel("actor"), value_panel("actor"), Panel("exploration", soft)]
