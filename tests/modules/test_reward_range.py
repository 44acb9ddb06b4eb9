"""Bounds of rewards: they widen with what is trained on, keep what is said within, and each seed has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent
from deflow.modules.reward_range import RewardRange
from deflow.types import Spec, stack
from tests.agents.tester import random_batch
from tests.conftest import compose_config

CRITIC = ("critic", ("agent/critic=occupancy",))
MODEL = ("dynamics", ("agent/dynamics=gaussian", "agent.dynamics.expansion=1"))
FLOW = ("dynamics", ("agent/dynamics=flow", "agent.dynamics.expansion=1"))


def make(*overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "agent=fql", "networks.hidden=[8]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


def bounds(part: Any) -> list[float]:
    return [part.reward_range.lowest.item(), part.reward_range.highest.item()]


def learn(agent: Any, rewards: float) -> None:
    """One evaluation of the losses, of transitions that all earn the same, and its gradient."""
    batch = random_batch(agent)
    batch = batch._replace(rewards=torch.full_like(batch.rewards, rewards))
    torch.stack([loss for _, loss, _ in agent.losses(batch, agent.noise(batch, "test"))]).sum().backward()


def test_it_widens_and_keeps() -> None:
    rewards = RewardRange()
    said = torch.tensor([[-9.0, 1.0, 9.0]])
    assert torch.equal(rewards.kept(said), said)
    rewards.widen(torch.tensor([0.0, 5.0]))
    assert rewards.kept(said).tolist() == [[0.0, 1.0, 5.0]]
    rewards.widen(torch.tensor([3.0, 8.0]))
    rewards.widen(torch.tensor([-1.0, 2.0]))
    assert rewards.kept(said).tolist() == [[-1.0, 1.0, 8.0]]
    rewards.eval().widen(torch.tensor([100.0]))
    assert rewards.kept(said).tolist() == [[-1.0, 1.0, 8.0]]


@pytest.mark.parametrize("part,overrides", [CRITIC, MODEL, FLOW])
def test_no_reward_is_imagined_that_the_data_do_not_hold(part: str, overrides: tuple[str, ...]) -> None:
    """Where all are the same, as in data without a success, so is what is imagined."""
    same = "{observation_mean: [0.0], observation_std: [1.0], reward_centre: -1.0, reward_scale: 1.0"
    steps = ", change_mean: [0.0], change_std: [1.0]" if part == "dynamics" else ""
    agent = make(*overrides, f"agent.{part}.statistics={same}{steps}}}")
    learn(agent, -1.0)
    assert bounds(getattr(agent, part)) == [-1.0, -1.0]


@pytest.mark.parametrize("part,overrides", [CRITIC, MODEL, FLOW])
def test_a_part_takes_in_what_it_is_trained_on(part: str, overrides: tuple[str, ...]) -> None:
    agent = make(*overrides)
    learn(agent, 0.0)
    before = bounds(getattr(agent, part))
    agent.begin_stage("test", ["actor"], first_step=0)
    learn(agent, 500.0)
    assert bounds(getattr(agent, part)) == before  # it rests
    agent.begin_stage("test", "all", first_step=0)
    learn(agent, 500.0)
    assert bounds(getattr(agent, part)) == [before[0], 500.0]
    again = make(*overrides)
    again.load_state_dict(agent.state_dict())
    assert bounds(getattr(again, part)) == [before[0], 500.0]


def test_values_of_rewards_that_are_better_than_the_statistics() -> None:
    statistics = "{observation_mean: [0.0], observation_std: [1.0], reward_centre: 2.5, reward_scale: 2.5}"
    agent = make("agent/critic=occupancy", f"agent.critic.statistics={statistics}", "task.discount=0.9")
    critic = agent.critic
    with torch.no_grad():
        for parameter in (*critic.reward.parameters(), *critic.target.parameters()):
            parameter.zero_()
        critic.reward.layers[-1].bias.fill_((8.0 - 2.5) / 2.5)  # it has learned that each step earns 8
        critic.target.layers[-1].bias[..., -1] = 9.0  # and that the task goes on
    batch = random_batch(agent)
    batch = batch._replace(rewards=torch.full_like(batch.rewards, 8.0), discounts=torch.full_like(batch.rewards, 0.9))
    _, metrics = critic.loss(batch, batch.actions, torch.rand(len(batch.rewards), critic.levels))
    assert metrics["q_mean"].item() == pytest.approx(8.0 / (1 - 0.9), rel=1e-5)


@pytest.mark.parametrize("part,overrides", [CRITIC, MODEL])
def test_each_seed_has_its_own(part: str, overrides: tuple[str, ...]) -> None:
    agents = [make(*overrides) for _ in range(2)]
    seeds = SeedStack(agents)
    seeds.begin_stage("test", "all", first_step=0)
    seeds.configure_optimizers()
    batch = random_batch(agents[0])
    batches = [batch._replace(rewards=torch.full_like(batch.rewards, best)) for best in (300.0, 500.0)]
    seeds.seed_noise("test")
    together: Any = stack(batches)
    torch.stack([loss for _, loss, _ in seeds.losses(together, seeds.next_noise(together))]).sum().backward()
    assert [bounds(getattr(agent, part)) for agent in agents] == [[300.0, 300.0], [500.0, 500.0]]


def test_compiled_code_widens_it_too() -> None:
    rewards = RewardRange()

    @torch.compile(backend="aot_eager")  # of the backends the one that needs no compiler
    def seen(batch: torch.Tensor) -> torch.Tensor:
        rewards.widen(batch)
        return rewards.kept(2 * batch)

    assert seen(torch.tensor([3.0, 8.0])).tolist() == [6.0, 8.0]
    assert seen(torch.tensor([3.0, 9.0])).tolist() == [6.0, 9.0]
