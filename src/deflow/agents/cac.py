"""CAC: a consistency policy that climbs the value through its few sampling steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic, take_best
from deflow.agents.algorithm import Loss, Traits
from deflow.agents.base import ALMOST_0
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.distributed import mean_over_ranks, world_size
from deflow.errors import UserError
from deflow.flow.schedules import growing_count, karras_times
from deflow.modules.consistency import HIGHEST, LOWEST, RHO, ConsistencyPolicy
from deflow.modules.critic import Critic
from deflow.ranges import Count, NonNegative, Seed
from deflow.types import Batch, Spec

FIRST_COUNT, LAST_COUNT = 2, 150  # boundaries between the noise levels, at the start and the end of a period
PERIOD = 50_000  # updates in which their number grows; then it begins anew
TEACHER_RESTS, TEACHER_EVERY = 1000, 5  # updates before the teacher first moves, and from one move to the next


class ConsistencyNoise(NamedTuple):
    """Every random number of an update; noise is standard normal."""

    z: Tensor  # of the policy's actions at s, shape (steps, batch, action_dim)
    z_next: Tensor  # of its actions at s', shape (steps, batch * backup samples, action_dim)
    consistency: Tensor  # of the consistency loss, shape (batch, action_dim)
    levels: Tensor  # its boundaries, shape (batch, 2)
    first: Tensor  # which member is climbed, 1.0 the first and 0.0 the second, a scalar


class CAC(ActorCritic):
    r"""Consistency actor-critic (arXiv 2309.16984).

    .. math::
        y &= r + \gamma m \min_k \max_{j \le M} \bar Q_k(s', a'_j), \quad a'_j \sim \bar\phi(s') \\
        \min_\theta &\; E \sum_k (Q_k(s, a) - y)^2 \\
        \min_\phi &\; L_{consistency}(\phi) - \eta E[Q_i(s, a_\phi)] / sg[E|Q_j(s, a_\phi)|]

    with i one member of two, drawn anew at every update, j the other one, and a gradient through all sampling steps of
    :math:`a_\phi`; see `ConsistencyPolicy`. It acts with one of N samples, drawn by the softmax of
    :math:`\min_k \bar Q_k`.

    Differences from the released code: the policy climbs the critic of before its step (there of after it), and targets
    and teacher move toward the weights of before the step (there after it), as everywhere here. Kernels are drawn by
    Xavier's uniform distribution, biases are 0 (there torch's own, of a third of the variance). The learning rate
    stays; there it may fall from epoch to epoch. The number of boundaries grows over 50,000 updates and then begins
    anew, as between two evaluations there, however long the run is.

    Args:
        spec: sizes of the task.
        critic: makes the Critic, of two members.
        actor: makes the ConsistencyPolicy.
        optimizer: makes the optimizer from parameter groups.
        seed: of every noise draw.
        eta: weight of the value against the consistency loss, >= 0; the papers tune it for each task.
        backup_samples: M, actions of the teacher at s' of which the target takes the best.
        normalise_target: divide targets by their standard deviation over the batch.
        best_of_n: N, samples among which it draws the action taken.

    Raises:
        UserError: unless the critic has two members.
    """

    actor: ConsistencyPolicy
    traits = Traits(trains_jointly=True, takes_lowest=True)
    _number = 0  # of the update at hand, over all stages
    _count: Tensor | None = None  # boundaries of the consistency model's time axis in it

    def __init__(
        self,
        spec: Spec,
        critic: Callable[[Spec], Critic],
        actor: Callable[[Spec], ConsistencyPolicy],
        optimizer: Callable[[Any], Optimizer],
        seed: Seed = 0,
        eta: NonNegative = 0.1,
        backup_samples: Count = 10,
        normalise_target: bool = False,
        best_of_n: Count = 50,
    ) -> None:
        super().__init__(spec, {"critic": critic(spec), "actor": actor(spec)}, optimizer, seed)
        self.require_ensemble()
        if self.critic.online.members != 2:
            raise UserError(
                f"CAC climbs one of two critics: set agent.critic.members=2, not {self.critic.online.members}"
            )
        self.eta, self.backup_samples, self.best_of_n = eta, backup_samples, best_of_n
        self.normalise_target = normalise_target

    def begin_update(self, step: int | None) -> None:
        super().begin_update(step)
        if step is not None:
            self._number = self._first_step + step
        count = growing_count(self._number % PERIOD, PERIOD, FIRST_COUNT, LAST_COUNT)
        if self._count is None or self._count.device != self.device:
            self._count = torch.empty((), device=self.device)
        self._count.fill_(count)  # a number would stay in a recorded update as it was

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> ConsistencyNoise:
        (rows, action_dim), device, steps = batch.actions.shape, batch.actions.device, self.actor.steps
        normal = torch.randn(
            steps * (1 + self.backup_samples) + 1, rows, action_dim, generator=generator, device=device
        )
        z, z_next, consistency = normal.split([steps, steps * self.backup_samples, 1])
        assert self._count is not None
        last = self._count - 2  # lower boundary
        lower = ((last + 1) * torch.rand(rows, 1, generator=generator, device=device)).floor().minimum(last)
        boundaries = karras_times(torch.cat([lower, lower + 1], dim=1), self._count, LOWEST, HIGHEST, RHO)
        first = torch.rand((), generator=generator, device=device)
        return ConsistencyNoise(
            z, z_next.reshape(steps, -1, action_dim), consistency[0], boundaries, (first > 0.5).float()
        )

    def losses(self, batch: Batch, noise: ConsistencyNoise) -> Iterator[Loss]:
        # Critic: toward the best of the teacher's actions at s'.
        if self.trains("critic"):
            with torch.no_grad():
                target = batch.rewards + batch.discounts * self._next_value(batch, noise.z_next)
                if self.normalise_target:
                    target = target / (_deviation(target) + ALMOST_0)
            yield "critic", *self.critic.loss_to(batch, target)

        # Policy: consistency on the data's actions, and the value of its own.
        if self.trains("actor"):
            consistency = self.actor.consistency_loss(batch, noise.consistency, noise.levels)
            actions = self.actor.sample(batch.observations, noise.z)
            q = self.critic.frozen_values(batch.observations, actions)
            sizes = mean_over_ranks(q.detach().abs().mean(1))
            one, size_of_other = torch.lerp(q[1], q[0], noise.first), torch.lerp(sizes[0], sizes[1], noise.first)
            value_loss = -one.mean() / size_of_other
            loss = consistency + self.eta * value_loss
            metrics = {"loss": loss, "consistency": consistency, "value_loss": value_loss, "q": q.mean()}
            yield "actor", loss, {name: value.detach() for name, value in metrics.items()}

    def moves_targets(self, part: str) -> bool:
        if part == "actor":
            return self.trains(part) and self._number >= TEACHER_RESTS and self._number % TEACHER_EVERY == 0
        return self.trains(part)

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        return (self.best_of_n, self.actor.steps * self.spec.action_dim + 1)  # one number to draw by

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        batch, candidates, _ = z.shape
        of_steps = z[..., :-1].reshape(batch * candidates, self.actor.steps, -1).movedim(1, 0)
        actions = self.actor.sample(observations, of_steps)
        values = self.critic.target_values(observations, actions).amin(0).reshape(batch, candidates)
        gumbel = -torch.special.log_ndtr(z[..., -1]).neg().log()  # of a normal number: the softmax' own draw
        return take_best(actions.reshape(batch, candidates, -1), values + gumbel)

    def panels(self) -> list[Panel]:
        terms = {"train/actor/consistency": "consistency", "train/actor/value_loss": "value, before eta"}
        return [loss_panel("critic", log=True), loss_panel("actor"), value_panel("actor"), Panel("terms", terms)]

    def _next_value(self, batch: Batch, z: Tensor) -> Tensor:
        """The target's value of s', shape (batch,)."""
        actions = self.actor.teacher_sample(batch.next_observations, z)
        values = self.critic.target_values(batch.next_observations, actions)
        return values.unflatten(1, (-1, self.backup_samples)).amax(-1).amin(0)


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the whole batch (of all ranks), a scalar."""
    count = len(values) * world_size()
    variance = mean_over_ranks((values - mean_over_ranks(values.mean())).square().mean())
    return (variance * count / max(count - 1, 1)).sqrt()
