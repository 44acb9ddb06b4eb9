"""FQL: the shared checks, the papers' settings, and a run of each schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deflow.agents.fql import FQL
from deflow.build import build_agent
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent, loss_of, random_batch
from tests.conftest import compose_config, tiny_config

# tasks.md of the papers.
ALPHA = {
    "antmaze": 10,
    "antmaze_giant": 10,
    "humanoidmaze_medium": 30,
    "humanoidmaze_large": 30,
    "antsoccer_arena": 10,
    "cube_single": 300,
    "cube_double": 300,
    "scene": 300,
    "puzzle_3x3": 1000,
    "puzzle_4x4": 1000,
    "antmaze-umaze-diverse-v2": 10,
    "antmaze-large-play-v2": 3,
    "pen-cloned-v1": 10000,
    "pen-expert-v1": 3000,
    "hammer-cloned-v1": 10000,
    "hammer-human-v1": 30000,
    "relocate-human-v1": 10000,
    "door-expert-v1": 30000,
}


def make(*overrides: str) -> FQL:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "agent=fql", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("agent.actor.normalize_q=true",),
        ("agent.critic.aggregate=min",),
        ("agent/critic=flow",),
        ("agent/critic=floq", "agent.critic.field_hidden=[8]"),
        ("agent/critic=occupancy",),
        ("agent/critic=occupancy", "agent.critic.members=2", "agent.critic.objective=td_cfm", "solver=heun"),
        ("agent.horizon=4",),
    ],
)
def test_shared_checks(overrides: tuple[str, ...]) -> None:
    check_agent(make(*overrides))


def test_each_draw_of_a_flow_critic_has_a_next_action_of_its_own() -> None:
    agent = make("agent/critic=floq")
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    assert noise.z_next.shape == (16 * 8, 3)
    assert len(noise.z_next.unique(dim=0)) == 16 * 8
    of_one = make().draw_noise(batch, torch.Generator().manual_seed(0))
    assert torch.equal(noise.z_next[::8], of_one.z_next)
    next_actions: list[torch.Tensor] = []
    agent.critic.loss = lambda batch, actions, levels: next_actions.append(actions) or (actions.sum(), {})
    loss_of(agent, "critic", batch, noise)
    expected = agent.actor.act(batch.next_observations.repeat_interleave(8, 0), noise.z_next)
    torch.testing.assert_close(next_actions[0], expected)


@pytest.mark.parametrize("experiment", ALPHA)
def test_the_papers_settings(experiment: str) -> None:
    config = compose_config(f"experiment={experiment}", "agent=fql")
    deflow = compose_config(f"experiment={experiment}")
    assert config.agent.actor.alpha == ALPHA[experiment]
    assert config.agent.critic.aggregate == deflow.agent.critic.aggregate
    assert not config.agent.actor.normalize_q
    assert "trust_region" not in config.agent  # nothing of DeFlow's comes along


def test_distillation_is_zero_where_the_actor_equals_the_flow() -> None:
    agent = make()
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    agent.actor.net.forward = agent.behavior_flow.propose  # type: ignore[method-assign]
    metrics = {part: values for part, _, values in agent.losses(batch, noise)}
    assert metrics["actor"]["distillation"] == 0
    assert metrics["actor"]["loss"] == -metrics["actor"]["q"]


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("stages", ["joint", "staged"])
def test_a_run(stages: str, point_data: Path, tmp_path: Path) -> None:
    summary = train(tiny_config(point_data, "experiment=pointmaze", "agent=fql", f"stages={stages}"), tmp_path)
    assert summary["agent"] == "FQL"
    assert summary["evaluations"] == 2
