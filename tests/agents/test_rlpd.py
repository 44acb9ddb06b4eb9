"""RLPD: the shared checks, the density of its policy, its temperature, and a run from scratch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from deflow.build import build_agent
from deflow.errors import UserError
from deflow.modules.gaussian import LOG_STD_RANGE, GaussianActor
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent, random_batch, squared_targets
from tests.conftest import compose_config, tiny_config


def make(*overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "agent=rlpd", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


@pytest.mark.parametrize("overrides", [(), ("agent.entropy_backup=false",), ("agent.horizon=2",)])
def test_shared_checks(overrides: tuple[str, ...]) -> None:
    check_agent(make(*overrides))


def test_the_density_is_that_of_a_squashed_gaussian() -> None:
    torch.manual_seed(0)
    actor = GaussianActor(Spec(5, 3), hidden=(16,)).double()
    observations, z = torch.randn(2, 20, 5).double()[0], torch.randn(20, 3).double()
    actions, log_probabilities = actor.sample(observations, z)
    mean, log_std = actor.net(observations).chunk(2, dim=-1)
    log_std = log_std.clamp(*LOG_STD_RANGE)
    squashed = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform(cache_size=1))
    torch.testing.assert_close(log_probabilities, squashed.log_prob(actions))


def test_the_temperature_holds_the_entropy() -> None:
    # With a flat value the entropy would grow without end but for the temperature, and fall without it.
    torch.manual_seed(0)
    actor = GaussianActor(Spec(1, 2), hidden=(16,), target_entropy=-1.5)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    metrics = {}
    for _ in range(1500):
        steep = lambda s, a: -20 * a.square().sum(-1)[None]  # noqa: E731 (prefers no noise at all)
        loss, metrics = actor.loss(torch.zeros(256, 1), torch.randn(256, 2), steep)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(metrics["entropy"]) == pytest.approx(-1.5, abs=0.15)


def test_the_target_is_the_smallest_of_the_drawn_members() -> None:
    agent = make("agent.entropy_backup=false")
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    assert len(set(noise.members.tolist())) == 2
    with torch.no_grad():
        actions, _ = agent.actor.sample(batch.next_observations, noise.z_next)
        values = agent.critic.target_values(batch.next_observations, actions)
        expected = agent.critic.loss_from(batch, values[noise.members].amin(0))[0]
    loss = next(loss for part, loss, _ in agent.losses(batch, noise) if part == "critic")
    torch.testing.assert_close(loss.detach(), expected)


def test_the_target_counts_the_next_actions_entropy() -> None:
    agent = make()
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    agent.actor.log_temperature.data.fill_(math.log(0.5))
    agent.actor.sample = lambda s, z: (z, z[:, 0])  # the second are log densities
    agent.critic.target_values = lambda s, a: torch.zeros(10, len(a))
    targets = batch.rewards - batch.discounts * 0.5 * noise.z_next[:, 0]
    torch.testing.assert_close(squared_targets(agent, batch, noise), targets.square().mean())


def test_it_explores_with_samples_and_acts_with_the_mode_whatever_it_is_doing() -> None:
    agent = make()
    observations, z = torch.randn(4, 5), torch.randn(2, 4, 3)
    mode, _ = agent.actor.sample(observations, torch.zeros(4, 3))
    for mode_of_the_networks in (True, False):
        agent.train(mode_of_the_networks)
        assert torch.equal(agent.act(observations, z[0]), mode)
        assert not torch.equal(agent.explore(observations, z[0]), agent.explore(observations, z[1]))


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match=r"target_members must be 1 to agent.critic.members=10"):
        make("agent.target_members=11")


def test_stages_that_do_not_fit_name_those_that_do() -> None:
    with pytest.raises(UserError, match=r"parts critic, actor; better, use stages=joint, .* or stages=from_scratch"):
        make().begin_stage("behavior", ("behavior_flow",), first_step=0)


@pytest.mark.usefixtures("short_episodes")
def test_a_run_from_scratch(point_data: Path, tmp_path: Path) -> None:
    overrides = ("experiment=pointmaze", "agent=rlpd", "stages=from_scratch", "online_updates=6")
    summary = train(tiny_config(point_data, *overrides), tmp_path)
    assert summary["stages"] == {"online": 6}
    assert summary["agent"] == "RLPD"


@pytest.mark.parametrize("name", ["rlpd", "cal_ql", "rebrac"])
def test_a_critic_that_is_a_flow_is_refused(name: str) -> None:
    overrides = (f"agent={name}", "agent/critic=flow", "agent.critic.value_range=[-1,0]", "networks.hidden=[8]")
    with pytest.raises(UserError, match="needs an ensemble of critics: use agent/critic=ensemble"):
        build_agent(compose_config("experiment=cube_single", *overrides).agent, Spec(5, 3))
