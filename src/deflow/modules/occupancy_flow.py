"""OccupancyFlow: action values from the states that lie ahead, which a flow samples without stepping through them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor

from deflow.errors import UserError
from deflow.flow.ode import Solver
from deflow.flow.path import straight_path
from deflow.modules.critic import Aggregate
from deflow.modules.reward_range import RewardRange
from deflow.modules.statistics import StateStatistics, register_statistics
from deflow.nets.average import polyak_pairs
from deflow.nets.encoder import make_encoder
from deflow.nets.frozen import frozen_call
from deflow.nets.mlp import MLP, EnsembleMLP
from deflow.ranges import Activation, Count, Discount, Share, Widths
from deflow.types import Batch, Metrics, Spec

Objective = Literal["td2_cfm", "td_cfm_coupled", "td_cfm"]

SMALLEST_LEVEL = 2.0**-25  # in the place of a uniform number of 0, half the step between two of them


class Future(NamedTuple):
    """A state ahead, of the policy's discounted future."""

    observations: Tensor  # (batch, observation_dim)
    continues: Tensor  # (batch,), 0 where the task has ended by then (in the state that is given), else 1


class Pair(NamedTuple):
    """A state and an action, as the networks see them."""

    state: Tensor  # standardised, shape (batch, observation_dim)
    action: Tensor  # (batch, action_dim)


class Draws(NamedTuple):
    """The random numbers of a loss: `times` uniform in [0, 1), the others standard normal."""

    times: Tensor  # (batch, 1)
    starts: Tensor  # (batch, point_dim), of the paths
    there: Tensor  # (batch, samples, point_dim), of the samples at (s', a')


class OccupancyFlow(LightningModule):
    r"""A flow over the states that lie ahead and what is earned there: takes the place of `Critic`.

    With the mask `m`, 0 where the task ended, the discounted occupancy of a policy obeys

    .. math:: M(\cdot \mid s, a) = E_{s', m} \left[ (1 - \gamma m) \, \delta_{(s', m)}
              + \gamma m \, M(\cdot \mid s', a') \right], \quad a' \sim \pi(s')

    over pairs of a state :math:`s_+`, which is reached after a number of further steps that is geometric, and whether
    the task goes on there; if not, it is the state in which it ended. Temporal-difference flow matching learns it from
    single transitions, of points :math:`x = ((s_+ - s) / \sigma_s, 2 m_+ - 1)`:

    .. math::
        L(\theta) &= E \left[ (1 - \gamma m) \, \| v_\theta(x_t, t \mid s, a) - (x_1 - x_0) \|^2
            + \gamma m \, \| v_\theta(\bar x_t, t \mid s, a) - \bar u_t \|^2 \right] \\
        L(\rho) &= E \, (\rho(s', m) - r)^2 \\
        V(s', a') &= \mathrm{agg}_k \mathrm{mean}_i \left[ \tfrac{m_+}{1 - \gamma} \, \rho(s_+, 1)
            + (1 - m_+) \, \rho(s_+, 0) \right], \quad (s_+, m_+)_{k, i} \sim \bar M_k(s', a') \\
        L(q) &= E \, \mathrm{mean}_j (q_j(s, a) - r - \gamma m \, V(s', a'))^2

    the squares averaged over the dimensions of `x`. The first term is flow matching on what follows at once. What the
    second learns of the target field :math:`\bar v` at :math:`(s', a')`, with its flow :math:`\bar\psi_t` from
    :math:`z \sim N(0, I)`, depends on the objective:

    - `td2_cfm`: its velocity where its flow is by then, :math:`\bar x_t = \bar\psi_t(z)`,
      :math:`\bar u_t = \bar v(\bar x_t, t \mid s', a')`;
    - `td_cfm_coupled`: the straight path from `z` to :math:`\bar\psi_1(z)`;
    - `td_cfm`: the straight path to :math:`\bar\psi_1(z)` from noise that is independent of `z`;

    each moved by :math:`t \, (s' - s) / \sigma_s`, as points are seen from `s`. The reward :math:`\rho` is that of a
    step into a state: what else it depends on is averaged over the data's steps (`reward_loss` is what stays
    unexplained, in squares of half the range of the rewards), but for that of the transition itself. In `V` it is kept
    between the lowest and the highest reward of the batches so far, as :math:`s_+` may be where
    no data are. The networks `q` give the policy what it climbs and chooses by. A batch must hold single steps, and
    discounts above 0 where the task goes on.

    Sources: TD-CFM, its coupled form and TD2-CFM of Temporal Difference Flows (arXiv 2503.09817); gamma-models
    (arXiv 2010.14496) for the idea. Differences from the papers: tasks end, and a point's last number says whether one
    has; states are seen from the one that they are ahead of; values are distilled.

    Args:
        spec: sizes of the task.
        statistics: of the data.
        discount: gamma, in [0, 1).
        hidden: widths of the hidden layers, of all networks.
        activation: see `activate`.
        solver: of the ODE.
        objective: `td2_cfm`, `td_cfm_coupled` or `td_cfm`.
        members: size of the ensemble of fields.
        aggregate: `mean` or `min` over the ensemble, in the target only.
        tau: share of the online weights that the targets take whenever they move, in (0, 1].
        samples: states ahead for each target.
        distilled: number of distilled networks.

    Raises:
        UserError: for images, action chunks, or statistics of another number of dimensions.
    """

    next_draws = 1  # all that is learned of a transition shares one next action
    observation_mean: Tensor
    observation_std: Tensor
    reward_centre: Tensor
    reward_scale: Tensor

    def __init__(
        self,
        spec: Spec,
        statistics: StateStatistics,
        discount: Discount,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        solver: Solver = Solver(),  # noqa: B008 (frozen)
        objective: Objective = "td2_cfm",
        members: Count = 1,
        aggregate: Aggregate = "mean",
        tau: Share = 0.005,
        samples: Count = 4,
        distilled: Count = 1,
    ) -> None:
        super().__init__()
        if spec.image is not None:
            raise UserError("agent/critic=occupancy models states, not images: use agent/critic=ensemble")
        if spec.horizon > 1:
            raise UserError(
                f"agent/critic=occupancy models single steps, not chunks of agent.horizon={spec.horizon} actions"
            )
        self.point_dim = spec.observation_dim + 1
        register_statistics(self, spec, statistics, "agent.critic.statistics")
        self.reward_range = RewardRange()
        of_state = make_encoder(spec, activation, None)
        beside_state = spec.action_dim + self.point_dim + 1
        self.online = EnsembleMLP(members, of_state, beside_state, hidden, self.point_dim, activation, norm="none")
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.reward = MLP(of_state, 1, hidden, 1, activation)
        self.q = EnsembleMLP(distilled, of_state, spec.action_dim, hidden, 1, activation)
        self.discount, self.solver, self.objective = discount, solver, objective
        self.aggregate: Aggregate = aggregate
        self.tau, self.samples = tau, samples

    @property
    def levels(self) -> int:
        """Uniform numbers that a loss takes for each transition."""
        return 1 + (1 + self.samples) * self.point_dim

    def loss(self, batch: Batch, next_actions: Tensor, levels: Tensor) -> tuple[Tensor, Metrics]:
        """Temporal-difference flow matching, and the distillation.

        Args:
            batch: single steps; its own `next_actions` are not read.
            next_actions: the policy's actions at `s'`, shape (batch, action_dim); no gradient flows into them.
            levels: uniform in [0, 1), shape (batch, levels).
        """
        self.reward_range.widen(batch.rewards)
        draws = self._draws(levels)
        goes_on = (batch.discounts > 0).to(draws.times.dtype)
        discounts = self.discount * goes_on
        here = Pair(self._standard(batch.observations), batch.actions)
        there = Pair(self._standard(batch.next_observations), next_actions)
        with torch.no_grad():
            ahead = self._ahead(there, draws.there)
            later, later_velocity = self._later(there, draws, ahead)
            next_values = self._aggregated(self._sampled_values(there, ahead).mean(-1))
            target = batch.rewards + discounts * next_values

        # Occupancy: where the next step leads, and where the policy's steps lead from there.
        step = there.state - here.state
        end = torch.cat([step, 2 * goes_on[:, None] - 1], dim=-1)
        soon, soon_velocity = straight_path(draws.starts, end, draws.times)
        # What lies ahead of s' lies farther ahead of s by the step between them, and so does each point on the way.
        farther = torch.cat([step, torch.zeros_like(step[:, :1])], dim=-1)
        later, later_velocity = later + draws.times * farther, later_velocity + farther
        of_soon = (self._velocity(self.online, here, soon, draws.times) - soon_velocity).square().mean(-1)
        of_later = (self._velocity(self.online, here, later, draws.times) - later_velocity).square().mean(-1)
        matching = ((1 - discounts) * of_soon + discounts * of_later).mean()

        # Reward, of the step into a state.
        rewards = (batch.rewards - self.reward_centre) / self.reward_scale
        reward_loss = (self.reward(there.state, goes_on[:, None]).squeeze(-1) - rewards).square().mean()

        # Distillation.
        distillation = (self.q(*here).squeeze(-1) - target / self._largest_reward).square().mean()

        loss = matching + reward_loss + distillation
        return loss, {
            "loss": loss.detach(),
            "matching": matching.detach(),
            "reward_loss": reward_loss.detach(),
            "distillation": distillation.detach(),
            "q_mean": target.mean(),
            "q_min": target.amin(),
            "q_max": target.amax(),
        }

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Distilled action values, shape (distilled, batch); there may be several actions for a state."""
        return self._largest_reward * self.q(self._standard(observations), actions).squeeze(-1)

    def target_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The same as `values`: what is distilled are the target field's."""
        return self.values(observations, actions)

    def frozen_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """As `values`, with a gradient into states and actions but none into the critic's own parameters."""
        return self._largest_reward * frozen_call(self.q, self._standard(observations), actions).squeeze(-1)

    @torch.no_grad()
    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Future:
        """States ahead, drawn from the first member's target field.

        Args:
            observations: shape (batch, observation_dim).
            actions: in [-1, 1], shape (batch, action_dim).
            z: standard normal noise, shape (batch, point_dim).
        """
        pair = Pair(self._standard(observations), actions)
        changes, sign = self._ahead(pair, z[:, None])[0, :, 0].split([self.point_dim - 1, 1], dim=-1)
        return Future(observations + self.observation_std * changes, (sign.squeeze(-1) > 0).to(changes.dtype))

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, target, tau)` for the agent's Polyak step."""
        return polyak_pairs(self.online, self.target, self.tau)

    # The flow.

    def _later(self, there: Pair, draws: Draws, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """Points on the way to a state ahead of `(s', a')`, and velocities there, each (members, batch, point_dim).

        `ahead` are the samples that began in `draws.there`.
        """
        if self.objective == "td2_cfm":
            points = self._solve(there, draws.starts, draws.times)
            return points, self._velocity(self.target, there, points, draws.times)
        starts = draws.there[:, 0] if self.objective == "td_cfm_coupled" else draws.starts
        return straight_path(starts, ahead[:, :, 0], draws.times)

    def _ahead(self, pair: Pair, z: Tensor) -> Tensor:
        """Ends of the target fields' flows, shape (members, batch, samples, point_dim), as `z` but for the members."""
        several = Pair(*(column.repeat_interleave(z.shape[1], 0) for column in pair))
        starts = z.flatten(0, 1)
        return self._solve(several, starts, torch.ones_like(starts[:, :1])).unflatten(1, z.shape[:2])

    def _solve(self, pair: Pair, z: Tensor, until: Tensor) -> Tensor:
        """Where the target fields' flows are at the times `until`, of shape (rows, 1): (members, rows, point_dim)."""

        def velocity(share: Tensor, points: Tensor) -> Tensor:
            return until * self._velocity(self.target, pair, points, share * until)

        return self.solver.sample(velocity, z.expand(self.target.members, -1, -1))

    def _velocity(self, field: EnsembleMLP, pair: Pair, points: Tensor, times: Tensor) -> Tensor:
        """Velocities of each member, shape (members, rows, point_dim); `points` are one's or each member's own."""
        shared = torch.cat([*pair, times], dim=-1)
        return field.head(torch.cat([column.expand(field.members, -1, -1) for column in (shared, points)], dim=-1))

    # Values.

    def _sampled_values(self, pair: Pair, ahead: Tensor) -> Tensor:
        """What each of the states ahead says of the pair's value, shape (members, batch, samples)."""
        changes, sign = ahead.split([self.point_dim - 1, 1], dim=-1)
        goes_on = sign > 0
        standard = self.reward(pair.state[:, None] + changes, goes_on.to(sign.dtype)).squeeze(-1)
        rewards = self.reward_range.kept(self.reward_centre + self.reward_scale * standard)
        # Of the steps that go on all count, of the end just the one that brings it.
        steps = torch.where(goes_on.squeeze(-1), 1 / (1 - self.discount), 1.0)
        return steps * rewards

    def _aggregated(self, values: Tensor) -> Tensor:
        """What the target takes of the members' values, shape (members, batch) -> (batch,)."""
        return values.amin(0) if self.aggregate == "min" else values.mean(0)

    # Units.

    @property
    def _largest_reward(self) -> Tensor:
        """The unit of `q`: not the largest value that it allows, beside which one that the end alone earns is tiny."""
        return self.reward_centre.abs() + self.reward_scale

    def _standard(self, observations: Tensor) -> Tensor:
        return (observations - self.observation_mean) / self.observation_std

    def _draws(self, levels: Tensor) -> Draws:
        times, normal = levels.split([1, levels.shape[1] - 1], dim=1)
        normal = torch.special.ndtri(normal.clamp(min=SMALLEST_LEVEL)).unflatten(1, (-1, self.point_dim))
        return Draws(times, normal[:, 0], normal[:, 1:])
