"""The flow critic: it finds known values, and the distilled network agrees with the flow."""

from __future__ import annotations

import pytest
import torch

from deflow.errors import UserError
from deflow.modules.critic import Aggregate
from deflow.modules.flow_critic import FlowCritic
from deflow.types import Batch, Spec

SPEC = Spec(observation_dim=1, action_dim=1)


def test_it_learns_a_known_value() -> None:
    # One state, the reward is the action and nothing follows: Q(a) = a, in the range [-1, 1].
    torch.manual_seed(0)
    critic = FlowCritic(SPEC, value_range=(-1.0, 1.0), hidden=(64, 64), tau=0.05)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(400):
        actions = torch.rand(128, 1) * 2 - 1
        states = torch.zeros(128, 1)
        batch = Batch(states, actions, actions[:, 0], torch.zeros(128), states, actions)
        loss, _ = critic.loss(batch, actions, torch.rand(128, 4))
        optimizer.zero_grad()
        loss.backward()
        for online, target, tau in critic.target_pairs():
            target.data.lerp_(online.data, tau)
        optimizer.step()
    actions = torch.linspace(-0.8, 0.8, 9)[:, None]
    flow, distilled = critic.target_values(torch.zeros(9, 1), actions), critic.values(torch.zeros(9, 1), actions)
    assert flow.shape == (2, 9)
    assert distilled.shape == (1, 9)
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
