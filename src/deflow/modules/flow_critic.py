"""FlowCritic: action values as the end points of a flow over returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor

from deflow.errors import UserError
from deflow.modules.critic import Aggregate
from deflow.nets.average import polyak_pairs
from deflow.nets.encoder import beside, make_encoder, repeat_to
from deflow.nets.frozen import frozen_call
from deflow.nets.mlp import EnsembleMLP
from deflow.ranges import Activation, Count, Interval, Share, Widths
from deflow.types import Batch, Metrics, Spec

DRAWS = 4  # kinds of uniform numbers: times, and starts for the matching, the distillation and the flow at s'


class Encoding(NamedTuple):
    """How the field sees a point on the flow, as a smooth histogram, and the time, as cosines."""

    bins: int
    margin: float  # of the bins beyond the value range at either end, as a share of it
    deviation: float  # of the histogram's normal distribution, as a share of the value range
    normalised: bool  # whether the bins sum to 1, and not to the part of the distribution that lies in them
    frequency: float  # of the cosines, in radians
    multiples: range  # of it, one a cosine


ENCODINGS = {
    # A deviation of about a bin. One bin lies outside the range at either end, so that a point that overshoots still
    # has a code of its own.
    "fine": Encoding(51, 1 / 51, 1 / 51, False, math.pi, range(16)),
    # The release's: a deviation of 16 bins, and of the time only its cosine.
    "broad": Encoding(50, 0.01, 16 * 1.02 / 50, True, 1.0, range(1, 2)),
}


class FlowCritic(LightningModule):
    r"""A velocity field over returns whose flow carries noise to the value; networks distilled from it for the policy.

    .. math::
        L(\theta) &= E \, \tfrac1K \sum_k \sum_i (v_k(t, z_t \mid s, a) - (y - z_0))^2, \quad z_t = (1 - t) z_0 + t y \\
        y &= r + d \, \mathrm{mean}_i \, \mathrm{agg}_k \bar\psi_k(1, z_0' \mid s', a') \\
        L(q) &= E \, \mathrm{mean}_j (q_j(s, a) - \mathrm{mean}_{i, k} \, \bar\psi_k(1, z_0 \mid s, a))^2

    :math:`\bar\psi_k(1, z_0)` is the end of the target field's flow from :math:`z_0 \sim U`, and `i` counts the draws
    of :math:`z_0` and `t` for each state; the distilled :math:`q` learns it at :math:`(s, a)` and at
    :math:`(s', a')`. Flows are computed in Euler steps and in units of the value range; a point on the flow is encoded
    as a smooth histogram and the time by cosines, without which the field is too smooth to make use of its steps.
    Source: floq (arXiv 2509.06863). Takes the place of `Critic` in DeFlow, FQL, IFQL,
    FAWAC and FBRAC.

    Differences from the released code, each a setting but for the last three (`agent=fql agent/critic=floq` is the
    released one):
    1. The flow starts around the middle of the value range (there around the value 0: in a tenth of the range at its
       upper end, where rewards are costs).
    2. A state has one draw (there 8: the target is their mean, and the matching's loss is summed over them).
    3. The encoding is fine (there broad: bins are 16 times narrower than the normal distribution that is put into them,
       and of the time its plain cosine is left: 64 Fourier features are computed and not used).
    4. There is one distilled network (there 2, of which the policy climbs the mean).
    5. It learns the target field's flow at both states (there the online field's at (s, a) alone).
    6. The field works in units of the value range (there of reward, so that its loss is larger by the range's square).
    7. All draws of a state share one next action, but for FQL (each has its own, as there), and the distillation has
       starts of its own (there those of the matching).
    8. A value range that follows from the data includes 0 and counts rewards that end the task once (there the extreme
       rewards alone, for ever), and the margin of the broad encoding is a share of it (there 0.01 of reward for ever:
       the same where rewards of steps that go on span 1).
    9. A point so far outside of the bins that none of them holds anything of it is encoded as zeros (there NaN).

    Args:
        spec: sizes of the task.
        value_range: lowest and highest value possible, in units of reward.
        hidden: widths of the hidden layers, of the field and of the distilled networks.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        members: size of the ensemble of fields.
        aggregate: `mean` or `min` over the ensemble, in the target only.
        tau: share of the online weights that the targets take whenever they move, in (0, 1].
        steps: Euler steps, at least 1.
        noise_width: width of the interval in which the flow starts, as a share of the range, in (0, 1].
        noise_around: what the range shrinks to when it becomes that interval: its `middle`, or the value `zero`.
        samples: draws of starts and times for each state.
        encoding: `fine` or `broad`, see `ENCODINGS`.
        units: of what the field gives: of the value `range`, or of `reward`.
        distilled: number of distilled networks.
        distil_from: the field whose values they learn: the `target` at both states, or the `online` one at the first.
        field_hidden: widths of the field's hidden layers, where they are others.

    Raises:
        UserError: if the lowest value is not below the highest, or flows shall start around a 0 that is not possible.
    """

    bin_edges: Tensor
    frequencies: Tensor

    def __init__(
        self,
        spec: Spec,
        value_range: Interval,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        members: Count = 2,
        aggregate: Aggregate = "mean",
        tau: Share = 0.005,
        steps: Count = 8,
        noise_width: Share = 0.25,
        noise_around: Literal["middle", "zero"] = "middle",
        samples: Count = 1,
        encoding: Literal["fine", "broad"] = "fine",
        units: Literal["range", "reward"] = "range",
        distilled: Count = 1,
        distil_from: Literal["target", "online"] = "target",
        field_hidden: Widths | None = None,
    ) -> None:
        super().__init__()
        low, high = float(value_range[0]), float(value_range[1])
        if not low < high:
            raise UserError(f"agent.critic.value_range must be [lowest, highest], got {list(value_range)}")
        if noise_around == "zero" and not low <= 0 <= high:
            raise UserError(f"agent.critic.noise_around=zero needs 0 in agent.critic.value_range, got {[low, high]}")
        seen = ENCODINGS[encoding]
        more = spec.action_dim + seen.bins + len(seen.multiples)
        self.online = EnsembleMLP(
            members, make_encoder(spec, activation, encoder), more, field_hidden or hidden, 1, activation
        )
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        of_observation = make_encoder(spec, activation, encoder)
        self.distilled = EnsembleMLP(distilled, of_observation, spec.action_dim, hidden, 1, activation)
        self.aggregate: Aggregate = aggregate
        self.tau = tau
        self.steps, self.samples, self.distil_from = steps, samples, distil_from
        self.low, self.scale = (low, high - low) if units == "range" else (0.0, 1.0)
        self.bottom, self.width = (low - self.low) / self.scale, (high - low) / self.scale  # in the field's units
        self.noise_width = noise_width
        self.noise_anchor = 0.5 if noise_around == "middle" else -low / (high - low)
        margin = seen.margin * self.width
        edges = torch.linspace(self.bottom - margin, self.bottom + self.width + margin, seen.bins + 1)
        self.register_buffer("bin_edges", edges, persistent=False)
        frequencies = seen.frequency * torch.tensor(seen.multiples)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.sharpness, self.normalised = 1 / (seen.deviation * self.width), seen.normalised

    @property
    def levels(self) -> int:
        """Uniform numbers that a loss takes for each transition."""
        return DRAWS * self.samples

    @property
    def next_draws(self) -> int:
        """Actions at s' that a loss may take for each transition: each of the draws its own, or one for all."""
        return self.samples

    def loss(self, batch: Batch, next_actions: Tensor, levels: Tensor) -> tuple[Tensor, Metrics]:
        """Flow matching toward the temporal-difference target, and the distillation.

        Args:
            batch: transitions.
            next_actions: the policy's actions at `s'`, shape (batch, action_dim), or one for each draw in consecutive
                rows; no gradient flows into them.
            levels: uniform in [0, 1), shape (batch, `self.levels`): the times, and where the flows start.
        """
        with torch.no_grad():
            next_starts = levels.chunk(DRAWS, dim=1)[3]
            next_values = self._flow(self.target, batch.next_observations, next_actions, next_starts)
            next_value = (next_values.mean(0) if self.aggregate == "mean" else next_values.amin(0)).mean(-1)
        loss, metrics = self.loss_from(batch, next_value, levels)
        if self.distil_from == "online":
            return loss, metrics
        distillation = self._distillation(batch.next_observations, next_actions, next_values)
        metrics |= {"loss": metrics["loss"] + distillation.detach(), "next_distillation": distillation.detach()}
        return loss + distillation, metrics

    def loss_from(self, batch: Batch, next_value: Tensor, levels: Tensor) -> tuple[Tensor, Metrics]:
        """The loss toward a value of `s'` from elsewhere, without gradient, shape (batch,); otherwise as `loss`."""
        times, starts, distillation_starts, _ = levels.chunk(DRAWS, dim=1)
        starts = self._starts(starts)
        path = self._unit(batch.rewards + batch.discounts * next_value)[:, None] - starts
        z_t = starts + times * path
        features = self.online.encoder(batch.observations)
        velocity = self._velocity(self.online, features, batch.actions, z_t.flatten(), times.flatten())
        matching = (velocity - path.flatten()).square().unflatten(1, path.shape).sum(-1).mean()

        with torch.no_grad():
            field = self.target if self.distil_from == "target" else self.online
            values = self._flow(field, batch.observations, batch.actions, distillation_starts)
        distillation = self._distillation(batch.observations, batch.actions, values)
        loss = matching + distillation
        return loss, {
            "loss": loss.detach(),
            "matching": matching.detach(),
            "distillation": distillation.detach(),
            "q_mean": values.mean(),
            "q_min": values.amin(),
            "q_max": values.amax(),
        }

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Distilled action values, shape (distilled, batch)."""
        return self._values_of(self.distilled(observations, actions).squeeze(-1))

    def target_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Values of every member's target field, from the middle of the starting interval, shape (members, batch)."""
        middle = torch.full_like(actions[:, :1], 0.5)
        return self._flow(self.target, observations, actions, middle).squeeze(-1)

    def frozen_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """As `values`, with a gradient into states and actions but none into the critic's own parameters."""
        return self._values_of(frozen_call(self.distilled, observations, actions).squeeze(-1))

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, target, tau)` for the agent's Polyak step."""
        return polyak_pairs(self.online, self.target, self.tau)

    def _distillation(self, observations: Tensor, actions: Tensor, values: Tensor) -> Tensor:
        """Squared error of the distilled networks against the mean over members and draws, in the field's units."""
        distilled = self.distilled(observations, actions).squeeze(-1)
        of_actions = values.flatten(1).unflatten(1, (len(actions), -1))
        return (distilled - self._unit(of_actions.mean(-1).mean(0))).square().mean()

    def _flow(self, field: EnsembleMLP, observations: Tensor, actions: Tensor, levels: Tensor) -> Tensor:
        """End points of a field's flows, in units of reward, shape (members, batch, draws)."""
        starts = levels.flatten()
        z = self._starts(starts).expand(field.members, -1)
        features = field.encoder(observations)
        for step in range(self.steps):
            times = torch.full_like(starts, step / self.steps)
            z = z + self._velocity(field, features, actions, z, times) / self.steps
        return self._values_of(z).unflatten(1, levels.shape)

    def _velocity(self, field: EnsembleMLP, features: Tensor, actions: Tensor, z_t: Tensor, times: Tensor) -> Tensor:
        """Velocities, shape (members, rows); `z_t` is of that shape or (rows,), `times` (rows,).

        Each row of features and actions serves equally many consecutive ones.
        """
        z_t = z_t.expand(field.members, -1)
        cumulative = torch.special.ndtr((self.bin_edges - z_t[..., None]) * self.sharpness)
        histogram = cumulative.diff(dim=-1)
        if self.normalised:
            inside = cumulative[..., -1:] - cumulative[..., :1]
            histogram = histogram / inside.clamp(min=torch.finfo(inside.dtype).tiny)
        waves = torch.cos(times[:, None] * self.frequencies)
        shared = beside(features, repeat_to(actions, len(times)), waves).expand(field.members, -1, -1)
        return field.head(torch.cat([shared, histogram], dim=-1)).squeeze(-1)

    def _starts(self, levels: Tensor) -> Tensor:
        """Starting points from uniform numbers in [0, 1)."""
        return self.bottom + self.width * (self.noise_anchor + self.noise_width * (levels - self.noise_anchor))

    def _unit(self, values: Tensor) -> Tensor:
        """Values in the field's units; in those of the range 0 is the lowest, 1 the highest."""
        return (values - self.low) / self.scale

    def _values_of(self, unit: Tensor) -> Tensor:
        return self.low + self.scale * unit
