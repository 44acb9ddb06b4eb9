"""The flow critic: it finds known values, and the distilled network agrees with the flow."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from deflow.errors import UserError
from deflow.modules.critic import Aggregate
from deflow.modules.flow_critic import FlowCritic
from deflow.types import Batch, Spec

SPEC = Spec(observation_dim=1, action_dim=1)
FLOQ: dict[str, Any] = {
    **{"noise_width": 0.1, "noise_around": "zero", "samples": 8, "encoding": "broad", "units": "reward"},
    **{"distilled": 2, "distil_from": "online"},
}


def flat(**settings: Any) -> FlowCritic:
    """A critic whose fields and distilled networks give 0: a flow ends where it starts."""
    critic = FlowCritic(SPEC, hidden=(8,), **settings)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
    return critic


def one_state(rewards: float = 0.0, discounts: float = 0.5) -> Batch:
    zero = torch.zeros(1, 1)
    return Batch(zero, zero, torch.tensor([rewards]), torch.tensor([discounts]), zero, zero)


@pytest.mark.parametrize("settings", [{}, FLOQ])
def test_it_learns_a_known_value(settings: dict[str, Any]) -> None:
    # One state, the reward is the action and nothing follows: Q(a) = a, in the range [-1, 1].
    torch.manual_seed(0)
    critic = FlowCritic(SPEC, value_range=(-1.0, 1.0), hidden=(64, 64), tau=0.05, **settings)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(400):
        actions = torch.rand(64, 1) * 2 - 1
        states = torch.zeros(64, 1)
        batch = Batch(states, actions, actions[:, 0], torch.zeros(64), states, actions)
        loss, _ = critic.loss(batch, actions, torch.rand(64, critic.levels))
        optimizer.zero_grad()
        loss.backward()
        for online, target, tau in critic.target_pairs():
            target.data.lerp_(online.data, tau)
        optimizer.step()
    actions = torch.linspace(-0.8, 0.8, 9)[:, None]
    flow, distilled = critic.target_values(torch.zeros(9, 1), actions), critic.values(torch.zeros(9, 1), actions)
    assert flow.shape == (2, 9)
    assert distilled.shape == (settings.get("distilled", 1), 9)
    assert (flow - actions[:, 0]).abs().max() < 0.1
    assert (distilled - actions[:, 0]).abs().max() < 0.1


@pytest.mark.parametrize(("aggregate", "next_value"), [("mean", -4.0), ("min", -5.0)])
def test_the_target_bootstraps_in_units_of_reward(aggregate: Aggregate, next_value: float) -> None:
    # A velocity of 0 leaves a flow where it starts, in the middle of the range; one of 0.2 ends a fifth of it higher.
    critic = FlowCritic(SPEC, value_range=(-10.0, 0.0), hidden=(8,), noise_width=1e-6, aggregate=aggregate)
    for parameter in critic.target.parameters():
        parameter.zero_()
    critic.target.layers[-1].bias[1] = 0.2  # type: ignore[union-attr, operator, index]
    expected = torch.tensor([[-5.0], [-3.0]]).expand(2, 3)
    torch.testing.assert_close(critic.target_values(torch.zeros(3, 1), torch.zeros(3, 1)), expected)
    zeros, rewards, discounts = torch.zeros(2, 1), torch.tensor([-1.0, -1.0]), torch.tensor([0.5, 0.0])
    batch = Batch(zeros, zeros, rewards, discounts, torch.ones(2, 1), zeros)
    with torch.no_grad():
        for parameter in critic.online.parameters():
            parameter.zero_()
        _, metrics = critic.loss(batch, torch.zeros(2, 1), torch.full((2, 4), 0.5))
    # Velocities of zero against (y + 5) / 10, y = r + d * (the value of s').
    matching = [(-1 + 0.5 * next_value + 5) / 10, (-1 + 5) / 10]
    assert metrics["matching"].item() == pytest.approx((matching[0] ** 2 + matching[1] ** 2) / 2, rel=1e-4)
    assert metrics["q_mean"].item() == pytest.approx(-4.0)


def test_a_range_without_width_is_refused() -> None:
    with pytest.raises(UserError, match="value_range must be"):
        FlowCritic(SPEC, value_range=(0.0, 0.0))


@pytest.mark.parametrize(
    ("value_range", "around", "lowest", "highest"),
    [((-100.0, 0.0), "zero", -10.0, 0.0), ((-50.0, 150.0), "zero", -5.0, 15.0), ((-50.0, 150.0), "middle", 40.0, 60.0)],
)
@pytest.mark.parametrize("units", ["range", "reward"])
def test_the_interval_in_which_a_flow_starts(
    value_range: tuple[float, float], around: str, lowest: float, highest: float, units: str
) -> None:
    critic = flat(value_range=value_range, noise_width=0.1, noise_around=around, samples=2, units=units)
    levels = torch.zeros(1, critic.levels)
    levels[:, 5] = 1.0  # of the distillation, whose starts are the values of a flow that stays where it is
    _, metrics = critic.loss(one_state(), torch.zeros(1, 1), levels)
    assert metrics["q_min"].item() == pytest.approx(lowest, abs=1e-4)
    assert metrics["q_max"].item() == pytest.approx(highest, abs=1e-4)


@pytest.mark.parametrize(("aggregate", "next_value"), [("mean", -4.0), ("min", -5.0)])
def test_the_target_is_the_mean_over_draws_and_the_matching_their_sum(aggregate: Aggregate, next_value: float) -> None:
    critic = flat(value_range=(-100.0, 0.0), aggregate=aggregate, **FLOQ | {"samples": 2})
    critic.target.layers[-1].bias.data[1] = 2.0  # type: ignore[union-attr, operator, index]
    times, starts, next_starts = [0.3, 0.9], [0.0, 0.5], [0.25, 0.75]  # from -10 and -5; from -7.5 and -2.5 at s'
    levels = torch.tensor([times + starts + [0.0, 0.0] + next_starts])
    _, metrics = critic.loss(one_state(rewards=-1.0), torch.zeros(1, 1), levels)
    target = -1.0 + 0.5 * next_value  # of the members' ends: -7.5 and -5.5, -2.5 and -0.5
    assert metrics["matching"].item() == pytest.approx((target + 10) ** 2 + (target + 5) ** 2, rel=1e-5)


def test_distilled_networks_learn_the_online_flow_here_alone() -> None:
    critic = flat(value_range=(-100.0, 0.0), **FLOQ | {"samples": 2})
    for bias, value in ((critic.online.layers[-1].bias, 3.0), (critic.target.layers[-1].bias, 7.0)):
        bias.data.fill_(value)  # type: ignore[union-attr, operator]
    critic.distilled.layers[-1].bias.data[1] = -1.0  # type: ignore[union-attr, operator, index]
    levels = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.25, 0.75, 0.0, 0.0]])  # distilled from -7.5 and -2.5
    loss, metrics = critic.loss(one_state(), torch.zeros(1, 1), levels)
    assert metrics["distillation"].item() == pytest.approx((2.0**2 + 1.0**2) / 2)  # -5 + 3, against 0 and -1
    assert "next_distillation" not in metrics
    torch.testing.assert_close(loss.detach(), metrics["matching"] + metrics["distillation"])


def test_the_broad_encoding_is_a_histogram_that_sums_to_1() -> None:
    critic = flat(value_range=(-100.0, 0.0), **FLOQ)
    seen: list[torch.Tensor] = []
    critic.target.head = lambda x: seen.append(x) or torch.zeros(2, len(x[0]), 1)  # type: ignore[method-assign]
    critic.target_values(torch.zeros(1, 1), torch.zeros(1, 1))
    edges = [-101.0 + 102.0 / 50 * k for k in range(51)]
    below = [0.5 * math.erf((edge + 5.0) / (16 * 102.0 / 50 * math.sqrt(2))) for edge in edges]  # it starts at -5
    expected = [(right - left) / (below[-1] - below[0]) for left, right in pairwise(below)]
    inputs = seen[2][0, 0].tolist()  # observation, action, the cosine of the time, the histogram
    assert inputs[:3] == pytest.approx([0.0, 0.0, math.cos(2 / 8)])
    assert inputs[3:] == pytest.approx(expected, abs=1e-5)
    far = critic._velocity(critic.online, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([1e6]), torch.zeros(1))
    assert far.isfinite().all()


@pytest.mark.parametrize("distil_from", ["target", "online"])
def test_each_draw_may_have_a_next_action_of_its_own(distil_from: Any) -> None:
    torch.manual_seed(0)
    critic = FlowCritic(SPEC, (-10.0, 0.0), hidden=(8,), samples=2, noise_width=1e-6, distil_from=distil_from)
    actions, levels = torch.tensor([[-0.5], [0.9]]), torch.full((1, 8), 0.5)
    ends = critic.target_values(torch.zeros(2, 1), actions)
    batch = one_state(rewards=-1.0)
    _, metrics = critic.loss(batch, actions, levels)
    expected = critic.loss_from(batch, ends.mean()[None], levels)[1]
    torch.testing.assert_close(metrics["matching"], expected["matching"])
    if distil_from == "target":
        learned = (critic.values(torch.zeros(2, 1), actions) - ends.mean(0)) / 10
        torch.testing.assert_close(metrics["next_distillation"], learned.square().mean().detach())
