"""Models of the environment's steps: a flow over what follows from a state and an action, and a Gaussian."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from deflow.errors import UserError
from deflow.flow.ode import Solver
from deflow.flow.path import straight_path
from deflow.modules.reward_range import RewardRange
from deflow.modules.statistics import StepStatistics, register_statistics
from deflow.nets.average import Average
from deflow.nets.encoder import make_encoder
from deflow.nets.frozen import frozen_call
from deflow.nets.mlp import MLP
from deflow.nets.vector_field import VectorField
from deflow.ranges import Activation, Discount, Interval, Natural, Positive, Rate, Widths
from deflow.types import Batch, Metrics, Spec


class Outcome(NamedTuple):
    """What one step leads to."""

    observations: Tensor  # (batch, observation_dim), of s'
    rewards: Tensor  # (batch,)
    continues: Tensor  # (batch,), 0 where the task ended, else 1


class TransitionModel(LightningModule, ABC):
    r"""A distribution of the outcome of a step, given `(s, a)`: what both kinds of model have in common.

    The outcome is :math:`x = ((s' - s - \mu_\Delta) / \sigma_\Delta, (r - c_r) / h_r, 2 m - 1)`, of width
    observation_dim + 2, where the mask `m` is 0 if the task ended; networks see :math:`(s - \mu_s) / \sigma_s` and `a`.
    The statistics are buffers. A batch must hold single steps, and discounts above 0 where the task goes on.

    Args:
        spec: sizes of the task.
        statistics: of the data.
        discount: gamma of the imagined steps, in [0, 1).
        expansion: steps that the critic's target takes in the model before it bootstraps (model-based value expansion,
            arXiv 1803.00101).
        within: error that the model may have in open loop at the last imagined step, as a share of that of a model in
            which nothing changes, > 0: a stage in which the model rests begins by finding out how many steps that
            allows, see `steps_within`. None: as many as are asked for.

    Raises:
        UserError: for images, action chunks, or statistics of another number of dimensions.
    """

    observation_mean: Tensor
    observation_std: Tensor
    change_mean: Tensor
    change_std: Tensor
    reward_centre: Tensor
    reward_scale: Tensor

    def __init__(
        self,
        spec: Spec,
        statistics: StepStatistics,
        discount: Discount = 0.99,
        expansion: Natural = 0,
        within: Positive | None = None,
    ) -> None:
        super().__init__()
        if spec.image is not None:
            raise UserError("agent.dynamics models states, not images: leave it out with agent/dynamics=null")
        if spec.horizon > 1:
            raise UserError(f"agent.dynamics models single steps, not chunks of agent.horizon={spec.horizon} actions")
        self.spec, self.outcome_dim = spec, spec.observation_dim + 2
        register_statistics(self, spec, statistics, "agent.dynamics.statistics")
        self.reward_range = RewardRange()
        self.discount, self.expansion, self.within = discount, expansion, within

    @abstractmethod
    def loss(self, batch: Batch, x_0: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
        """How badly the model explains the batch's outcomes.

        Args:
            batch: single steps; only `next_actions` are not read.
            x_0: standard normal noise, shape (batch, outcome_dim).
            times: in [0, 1], shape (batch, 1).
        """

    @abstractmethod
    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        """The outcomes `x`, in the quickest way there is, with a gradient; the arguments are those of `sample`."""

    def imagine(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        """Outcomes with a gradient into states and actions, but none into the model's own parameters.

        Rewards are kept in the range of those that the model was trained on. The arguments are those of `sample`.
        """
        outcome = self._outcome(observations, frozen_call(self, observations, actions, z))
        return outcome._replace(rewards=self.reward_range.kept(outcome.rewards))

    @abstractmethod
    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        """Outcomes drawn from the model, without gradient.

        Args:
            observations: shape (batch, observation_dim).
            actions: in [-1, 1], shape (batch, action_dim).
            z: standard normal noise, shape (batch, outcome_dim).
        """

    def samplers(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Outcome]]:
        """Every way to draw outcomes, by its name; the arguments are those of `sample`."""
        return {"sample": self.sample}

    def outcomes_of(self, batch: Batch) -> Tensor:
        """What the networks learn of a batch, shape (batch, outcome_dim)."""
        changes = (batch.next_observations - batch.observations - self.change_mean) / self.change_std
        rewards = (batch.rewards - self.reward_centre) / self.reward_scale
        continues = (batch.discounts > 0).to(rewards.dtype)
        return torch.cat([changes, rewards[:, None], 2 * continues[:, None] - 1], dim=-1)

    def _inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """What the networks see, shape (batch, observation_dim + action_dim)."""
        return torch.cat([(observations - self.observation_mean) / self.observation_std, actions], dim=-1)

    def _outcome(self, observations: Tensor, x: Tensor) -> Outcome:
        """The inverse of `outcomes_of`, for the states in which the steps began."""
        changes, rewards, continues = x.split([self.spec.observation_dim, 1, 1], dim=-1)
        return Outcome(
            observations + self.change_mean + self.change_std * changes,
            self.reward_centre + self.reward_scale * rewards.squeeze(-1),
            (continues.squeeze(-1) > 0).to(x.dtype),
        )


class TransitionFlow(TransitionModel):
    r"""Flow matching on the outcome `x` of a step, see `TransitionModel`.

    .. math:: L(\xi) = E_{(s, a, x), x_0, t} \| v_\xi(s, a, (1 - t) x_0 + t x, t) - (x - x_0) \|^2

    averaged over the batch and the outcome's dimensions. With `one_step`, a network learns the same map from noise to
    outcome in a single evaluation, as FQL's policy learns that of its flow; its noise is the path's:

    .. math:: L(\omega) = E \| g_\omega(s, a, x_0) - sg[\mu_\xi(s, a, x_0)] \|^2

    Args:
        spec: sizes of the task.
        statistics: of the data, see `TransitionModel`.
        hidden: widths of the hidden layers, of both networks.
        activation: see `activate`.
        solver: of the ODE.
        one_step: train the one-step copy beside the flow, for which each update solves the ODE; what is imagined
            comes from it.
        ema: if given, an average of the flow's weights that keeps this share of itself at every update, in [0, 1),
            stands in for it in evaluation mode, in which a frozen model is too; the one-step copy learns from it.
        discount, expansion, within: of imagined steps, see `TransitionModel`.

    Raises:
        UserError: as `TransitionModel`.
    """

    def __init__(
        self,
        spec: Spec,
        statistics: StepStatistics,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        solver: Solver = Solver(),  # noqa: B008 (frozen)
        one_step: bool = False,
        ema: Rate | None = None,
        discount: Discount = 0.99,
        expansion: Natural = 0,
        within: Positive | None = None,
    ) -> None:
        super().__init__(spec, statistics, discount, expansion, within)
        encoder = make_encoder(_of_inputs(spec), activation, None)
        self.field = VectorField(encoder, self.outcome_dim, hidden, activation)
        self.average = Average(self.field, ema)
        self.one_step = MLP(encoder, self.outcome_dim, hidden, self.outcome_dim, activation) if one_step else None
        self.solver = solver

    def loss(self, batch: Batch, x_0: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
        self.reward_range.widen(batch.rewards)
        x_t, velocity = straight_path(x_0, self.outcomes_of(batch), times)
        inputs = self._inputs(batch.observations, batch.actions)
        matching = (self.field(inputs, x_t, times) - velocity).square().mean()
        if self.one_step is None:
            return matching, {"loss": matching.detach()}
        with torch.no_grad():
            outcomes = self._walk(self.average.always(self.field), inputs, x_0)
        distillation = (self.one_step(inputs, x_0) - outcomes).square().mean()
        loss = matching + distillation
        return loss, {
            "loss": loss.detach(),
            "matching": matching.detach(),
            "distillation": distillation.detach(),
        }

    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        inputs = self._inputs(observations, actions)
        if self.one_step is not None:
            return self.one_step(inputs, z)
        return self._walk(self.average.of(self.field), inputs, z)

    @torch.no_grad()
    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        field = self.average.of(self.field)
        return self._outcome(observations, self._walk(field, self._inputs(observations, actions), z))

    @torch.no_grad()
    def sample_at_once(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        """Samples of the one-step copy; otherwise as `sample`.

        Raises:
            UserError: if there is none.
        """
        if self.one_step is None:
            raise UserError("there is no one-step copy of the transition flow: train with agent.dynamics.one_step=true")
        return self._outcome(observations, self.one_step(self._inputs(observations, actions), z))

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, average, share)` for the agent's Polyak step."""
        yield from self.average.pairs(self.field)

    def samplers(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Outcome]]:
        return super().samplers() | ({} if self.one_step is None else {"one_step": self.sample_at_once})

    def _walk(self, field: VectorField, inputs: Tensor, z: Tensor) -> Tensor:
        r"""The flow's outcome :math:`\mu_\xi(s, a, z)`."""
        return self.solver.walk(lambda t, x: field(inputs, x, t.expand(len(x), 1)), z)


class TransitionGaussian(TransitionModel):
    r"""A Gaussian with a diagonal covariance over the outcome `x` of a step: what a flow must be better than.

    .. math:: L(\xi) = -E \log N(x; \mu_\xi(s, a), \sigma_\xi^2(s, a)) / \dim x

    Args:
        spec: sizes of the task.
        statistics: of the data, see `TransitionModel`.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        log_std_range: lowest and highest logarithm of the standard deviation of an outcome, approached smoothly.
        discount, expansion, within: of imagined steps, see `TransitionModel`.

    Raises:
        UserError: as `TransitionModel`, or if the lowest logarithm is not below the highest.
    """

    def __init__(
        self,
        spec: Spec,
        statistics: StepStatistics,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        log_std_range: Interval = (-5.0, 1.0),
        discount: Discount = 0.99,
        expansion: Natural = 0,
        within: Positive | None = None,
    ) -> None:
        super().__init__(spec, statistics, discount, expansion, within)
        if not log_std_range[0] < log_std_range[1]:
            raise UserError(f"agent.dynamics.log_std_range must be [lowest, highest], got {list(log_std_range)}")
        self.net = MLP(make_encoder(_of_inputs(spec), activation, None), 0, hidden, 2 * self.outcome_dim, activation)
        self.log_std_range = tuple(log_std_range)

    def loss(self, batch: Batch, x_0: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
        self.reward_range.widen(batch.rewards)
        loss = -self.log_prob(batch).mean() / self.outcome_dim
        return loss, {"loss": loss.detach()}

    def log_prob(self, batch: Batch) -> Tensor:
        """Log densities of the batch's outcomes `x`, in nats, shape (batch,)."""
        mean, log_std = self._moments(batch.observations, batch.actions)
        deviations = (self.outcomes_of(batch) - mean) * (-log_std).exp()
        return -(0.5 * deviations.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        mean, log_std = self._moments(observations, actions)
        return mean + log_std.exp() * z

    @torch.no_grad()
    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        return self._outcome(observations, self(observations, actions, z))

    def _moments(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of the standard deviations of `x`, each of shape (batch, outcome_dim)."""
        mean, log_std = self.net(self._inputs(observations, actions)).chunk(2, dim=-1)
        low, high = self.log_std_range
        # Unlike a clamp, these bounds leave a gradient, so that no deviation is stuck beyond them.
        log_std = high - F.softplus(high - log_std)
        return mean, low + F.softplus(log_std - low)


def _of_inputs(spec: Spec) -> Spec:
    """A task whose observation is the state with the action beside it."""
    return spec._replace(observation_dim=spec.observation_dim + spec.action_dim)
