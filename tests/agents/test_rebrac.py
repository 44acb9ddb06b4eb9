"""ReBRAC: the shared checks, its rhythm and its settings."""

from __future__ import annotations

from typing import Any

import torch

from deflow.agents.rebrac import ReBRAC, SmoothingNoise
from deflow.build import build_agent
from deflow.types import Spec
from tests.agents.tester import check_agent, random_batch, squared_targets
from tests.conftest import compose_config


def make(*overrides: str) -> ReBRAC:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "agent=rebrac", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


def test_shared_checks() -> None:
    check_agent(make())


def test_the_papers_settings() -> None:
    weights = {}
    for task in ("antmaze_large", "cube_single", "puzzle_3x3", "visual_scene"):
        agent = compose_config(f"task={task}", "agent=rebrac").agent
        weights[task] = agent.actor_weight, agent.critic_weight
    assert weights == {
        "antmaze_large": (0.003, 0.01),
        "cube_single": (1, 0),
        "puzzle_3x3": (0.3, 0.01),
        "visual_scene": (0.1, 0.01),
    }


def test_exploring_is_near_acting() -> None:
    agent, batch = make(), random_batch(make())
    z = torch.randn(16, 3)
    acted, explored = agent.act(batch.observations, z), agent.explore(batch.observations, z)
    assert torch.equal(acted, agent.act(batch.observations, -z))
    assert 0.05 < (acted - explored).abs().mean() < 0.5


def test_the_target_is_held_near_the_datas_next_action_from_a_clipped_noise_away() -> None:
    agent: Any = make("agent.critic_weight=2", "agent.noise=0.2", "agent.noise_clip=0.5")
    batch = random_batch(agent)
    agent.actor.target_actions = lambda s: torch.zeros(len(s), 3)
    agent.critic.target_values = lambda s, a: torch.tensor([[1.0], [3.0]]) * a[:, 0]
    z_next = torch.full((16, 3), 10.0)  # a noise of 2, which is cut to 0.5
    targets = batch.rewards + batch.discounts * (0.5 - 2 * (0.5 - batch.next_actions).square().sum(-1))
    torch.testing.assert_close(squared_targets(agent, batch, SmoothingNoise(z_next)), targets.square().mean())


def test_targets_move_with_the_actor_and_it_drifts_in_between() -> None:
    assert moved_by_updates("agent.drift=true")[2] == {"critic.online", "actor.online"}
    moved = moved_by_updates("agent.drift=false")
    assert moved[0] == moved[2] == {"critic.online"}
    assert moved[1] == {"critic.online", "actor.online", "critic.target"}  # the actor's target is where it is going
    assert moved[3] == {"critic.online", "actor.online", "critic.target", "actor.target"}


def moved_by_updates(*settings: str) -> list[set[str]]:
    """The networks whose weights change in each of four updates."""
    agent, batch = make("agent.actor.tau=0.5", "agent.critic.tau=0.5", *settings), random_batch(make())
    optimizer = agent.configure_optimizers()
    moved: list[set[str]] = []
    for number in range(4):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        agent.begin_update(number)
        optimizer.zero_grad()
        torch.stack([loss for _, loss, _ in agent.losses(batch, agent.noise(batch, number))]).sum().backward()
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()
        after = agent.state_dict()
        moved.append({name.rsplit(".", 3)[0] for name in after if not torch.equal(before[name], after[name])})
    return moved
