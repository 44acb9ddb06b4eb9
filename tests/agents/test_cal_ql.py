"""Cal-QL: the shared checks, its target, and what calibration does to the gap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deflow.agents.cal_ql import CalQL
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.types import Spec
from tests.agents.tester import check_agent, loss_of, random_batch
from tests.conftest import compose_config


def make(*overrides: str) -> Any:
    torch.manual_seed(0)
    overrides = ("experiment=cube_single", "agent=cal_ql", "networks.hidden=[16,16]", "agent.samples=3", *overrides)
    return build_agent(compose_config(*overrides).agent, Spec(5, 2))


@pytest.mark.parametrize(
    "overrides", [(), ("agent.max_backup=false",), ("agent.horizon=2",), ("agent.target_gap=0.8",)]
)
def test_shared_checks(overrides: tuple[str, ...]) -> None:
    check_agent(make(*overrides))


def test_the_target_is_the_best_of_the_policys_actions() -> None:
    agent = make("agent.conservatism=0")
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = []
        for z in noise.z_target:
            actions, _ = agent.actor.sample(batch.next_observations, z)
            values.append(agent.critic.target_values(batch.next_observations, actions).amin(0))
        expected = agent.critic.loss_from(batch, torch.stack(values).amax(0))[0]
    loss = next(loss for part, loss, _ in agent.losses(batch, noise) if part == "critic")
    torch.testing.assert_close(loss.detach(), expected)


def gap(agent: CalQL, returns: float, values: float) -> Tensor:
    """The gap if the critic gives the same value to every action."""
    with torch.no_grad():
        agent.critic.online.layers[-1].weight.zero_()
        agent.critic.online.layers[-1].bias.fill_(values)
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    return agent._gap(batch._replace(returns=torch.full_like(batch.rewards, returns)), noise)


def test_values_above_the_return_are_pushed_down_and_those_below_are_not() -> None:
    agent = make()
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_here = agent.actor.sample(batch.observations.repeat(3, 1), noise.z_policy[0].flatten(0, 1))[1]
        log_there = agent.actor.sample(batch.next_observations.repeat(3, 1), noise.z_policy[1].flatten(0, 1))[1]
    logs = torch.cat([log_here, log_there]).unflatten(0, (6, 16))
    uniform = torch.full((3, 16), 2 * math.log(2.0))
    # All values equal and above the return: importance weights are all that is left.
    expected = torch.cat([uniform, -logs]).logsumexp(0).mean()
    torch.testing.assert_close(gap(agent, returns=-5.0, values=-4.0).detach(), expected)
    # Below it, the policy's actions count with the return, which has no gradient.
    low = gap(agent, returns=1000.0, values=-4.0)
    low.backward()
    torch.testing.assert_close(low.detach(), ((1000.0 - logs).logsumexp(0) + 4.0).mean())
    bias = agent.critic.online.layers[-1].bias.grad
    assert float(bias.sum()) == pytest.approx(-1.0)  # what is left raises the value of the data's action


def test_the_actor_climbs_the_smaller_value() -> None:
    agent = make()
    batch = random_batch(agent)
    agent.critic.frozen_values = lambda s, a: torch.tensor([[1.0], [3.0]]).expand(2, len(a))
    _, loss, metrics = loss_of(agent, "actor", batch, agent.noise(batch))
    assert metrics["q"] == 1
    entropy, target = metrics["entropy"], agent.actor.target_entropy
    temperature_loss = agent.actor.log_temperature * (entropy - target)
    torch.testing.assert_close(loss, -1 - metrics["temperature"] * entropy + temperature_loss)


def test_the_gaps_weight_rises_while_it_is_above_its_target() -> None:
    agent = make("agent.target_gap=0.8", "agent.conservatism=3")
    agent.multiplier.log_multiplier.data.fill_(math.log(2.0))
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    for gap, slope in ((5.0, -8.4), (0.3, 1.0)):  # minus 2 times what it is above the target
        agent._gap = lambda batch, noise, gap=gap: torch.tensor(gap)
        agent.zero_grad()
        loss_of(agent, "multiplier", batch, noise)[1].backward()
        assert agent.multiplier.log_multiplier.grad.item() == pytest.approx(slope, rel=1e-4)
    _, with_gap, metrics = loss_of(agent, "critic", batch, noise)  # of 0.3, the last
    agent._gap = lambda batch, noise: torch.tensor(0.0)
    without = loss_of(agent, "critic", batch, noise)[1]
    assert (with_gap - without).item() == pytest.approx(3 * 2 * 0.3, rel=1e-4)
    assert metrics["gap"] == pytest.approx(0.3)


def test_the_papers_settings() -> None:
    def tuned(task: str, agent: str = "cal_ql") -> list[Any]:
        config = compose_config(f"task={task}", f"agent={agent}", "stages=offline_to_online")
        of_agent = config.agent
        assert config.stages.online.environment.online_share == 0.5
        assert of_agent.optimizer.parts.actor.lr == 1e-4
        rewards = [config.data.reward_scale, config.data.reward_shift]
        return [of_agent.conservatism, of_agent.target_gap, list(of_agent.critic.hidden), *rewards]

    assert tuned("humanoidmaze_medium") == [5.0, 0.8, [512] * 4, 10, 0]
    assert tuned("antsoccer_arena") == [5.0, 0.2, [512] * 4, 10, 0]
    assert tuned("scene") == [0.01, None, [256] * 4, 10, 0]
    assert tuned("puzzle_4x4") == [0.003, None, [256] * 4, 10, 0]
    for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        assert tuned(f"antmaze-{maze}-v2") == [5.0, 0.8, [256] * 5, 10, 5]
    for task in ("pen", "door", "hammer", "relocate"):
        assert tuned(f"{task}-cloned-v1") == [1.0, None, [256] * 3, 1, 0]
    assert tuned("antmaze-large-play-v2", "cal_ql_original") == [5.0, 0.8, [256] * 4, 10, 5]


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match=r"agent.target_gap must be a number above 0 or null, got 0"):
        make("agent.target_gap=0")
    with pytest.raises(UserError, match=r"agent.conservatism must be a number of at least 0, got -1"):
        make("agent.conservatism=-1")
