"""DeFlow: the shared checks and its own choices at test time."""

from __future__ import annotations

import pytest
import torch

from deflow.agents.deflow import DeFlow
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.types import Spec
from tests.agents.tester import check_agent, random_batch
from tests.conftest import compose_config


def make(*overrides: str) -> DeFlow:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("agent.refiner.lagrange=false",),
        ("agent.refiner.objective=gradient_step",),
        ("agent.refiner.objective=demonstration",),
        ("agent.critic.aggregate=min",),
        ("agent/critic=flow",),
        ("agent/critic=floq",),
        ("agent/critic=occupancy", "agent.critic.objective=td_cfm_coupled"),
        ("agent.horizon=4",),
    ],
)
def test_shared_checks(overrides: tuple[str, ...]) -> None:
    check_agent(make(*overrides))


def test_best_of_n_takes_the_highest_value_of_the_refined_actions() -> None:
    agent, observations, z = make("agent.best_of_n=8"), torch.randn(4, 5), torch.randn(4, 8, 3)
    single = make()
    candidates = torch.stack([single.act(observations, z[:, i : i + 1]) for i in range(8)], dim=1)
    values = agent.critic.values(observations.repeat_interleave(8, 0), candidates.reshape(-1, 3)).mean(0).reshape(4, 8)
    expected = candidates[torch.arange(4), values.argmax(1)]
    torch.testing.assert_close(agent.act(observations, z), expected)


def test_iterative_refinement_never_lowers_the_value() -> None:
    observations, z = torch.randn(32, 5), torch.randn(32, 1, 3)
    agent = make("agent.refine_steps=4")
    base = agent.behavior_flow.propose(observations, z[:, 0])
    chosen = agent.act(observations, z)
    values = [agent.critic.values(observations, actions).mean(0) for actions in (base, chosen)]
    assert (values[1] >= values[0]).all()


def test_cached_proposals_replace_the_solver() -> None:
    agent = make()
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    cached = batch._replace(
        base_actions=agent.behavior_flow.propose(batch.observations, noise.z),
        next_base_actions=agent.behavior_flow.propose(batch.next_observations, noise.z_next),
    )
    fresh = [loss for _, loss, _ in agent.losses(batch, noise)]
    given = [loss for _, loss, _ in agent.losses(cached, noise)]
    torch.testing.assert_close(given, fresh)


def test_targets_follow_the_critic_only_while_it_trains() -> None:
    agent = make()
    with torch.no_grad():
        for parameter in agent.critic.online.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in agent.critic.target.parameters()]
    agent.begin_stage("behavior", ("behavior_flow",), first_step=0)
    agent.on_before_optimizer_step(agent.configure_optimizers())
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critic.target.parameters(), strict=True))
    agent.begin_stage("extraction", ("critic", "refiner"), first_step=0)
    agent.on_before_optimizer_step(agent.configure_optimizers())
    for old, new, online in zip(
        before, agent.critic.target.parameters(), agent.critic.online.parameters(), strict=True
    ):
        torch.testing.assert_close(new.detach(), 0.995 * old + 0.005 * online.detach())


@pytest.mark.parametrize("override", ["agent.best_of_n=0", "agent.refine_steps=0", "agent.critic.aggregate=max"])
def test_impossible_settings_are_refused(override: str) -> None:
    with pytest.raises(UserError, match=f"{override.partition('=')[0]} must be"):
        make(override)


def test_a_stage_must_name_parts_of_the_agent() -> None:
    with pytest.raises(UserError, match="behavior_flow, critic, refiner"):
        make().begin_stage("test", ("actor",), first_step=0)
