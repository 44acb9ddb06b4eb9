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
from deflow.modules.critic import Critic
from deflow.modules.gaussian import GaussianActor
from deflow.pipeline import train
from deflow.stored import modernised
from deflow.types import Spec
from tests.agents.tester import check_agent, loss_of, random_batch, squared_targets
from tests.conftest import compose_config, tiny_config

D4RL = ("antmaze-umaze-v2", "pen-cloned-v1")


def make(*overrides: str, agent: str = "rlpd_original") -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", f"agent={agent}", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


@pytest.mark.parametrize("agent", ["rlpd", "rlpd_original"])
@pytest.mark.parametrize("overrides", [(), ("agent.entropy_backup=true",), ("agent.horizon=2",)])
def test_shared_checks(agent: str, overrides: tuple[str, ...]) -> None:
    check_agent(make(*overrides, agent=agent))


def test_a_lowered_mean_passes_the_shared_checks() -> None:
    check_agent(make("agent.critic.rho=0.5", "agent.critic.members=4", agent="rlpd"))


def test_the_settings_of_both_forms() -> None:
    ours, adroit, theirs = (
        compose_config(f"task={task}", f"agent={agent}").agent
        for task, agent in (("scene", "rlpd"), ("pen-cloned-v1", "rlpd"), ("scene", "rlpd_original"))
    )
    original = [compose_config(f"task={task}", "agent=rlpd_original").agent for task in D4RL]
    assert [(a.target_members, a.entropy_backup, len(a.actor.hidden)) for a in original] == [
        (1, False, 3),
        (2, False, 3),
    ]
    assert list(theirs.critic.hidden) == list(theirs.actor.hidden) == [256, 256]
    shown = [(a.critic.members, a.critic.aggregate, a.target_members, a.entropy_backup) for a in (ours, adroit, theirs)]
    assert shown == [(2, "mean", None, False), (2, "min", None, False), (10, "min", 2, True)]


def test_the_mean_is_lowered_by_deviations_of_the_population() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0]], requires_grad=True)
    critic = Critic(Spec(5, 3), hidden=(8,), rho=0.5)
    lowered = critic.aggregated(values)
    assert lowered.tolist() == [1.5, 5.0]
    lowered.sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()  # where members agree, too
    assert Critic(Spec(5, 3), hidden=(8,)).aggregated(values).tolist() == [2.0, 5.0]
    assert Critic(Spec(5, 3), hidden=(8,), aggregate="min").aggregated(values).tolist() == [1.0, 5.0]
    with pytest.raises(UserError, match=r"agent\.critic\.rho=0\.5 lowers the mean: set agent.critic.aggregate=mean"):
        Critic(Spec(5, 3), hidden=(8,), aggregate="min", rho=0.5)


def test_the_actor_climbs_the_lowered_mean() -> None:
    agent = make("agent.critic.rho=2", agent="rlpd")
    batch = random_batch(agent)
    agent.critic.frozen_values = lambda s, a: torch.tensor([[1.0], [3.0]]).expand(2, len(a))
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    assert loss_of(agent, "actor", batch, noise)[2]["q"] == 0.0


def test_the_density_is_that_of_a_squashed_gaussian() -> None:
    torch.manual_seed(0)
    actor = GaussianActor(Spec(5, 3), hidden=(16,), log_std_range=(-0.3, 0.1)).double()
    observations, z = torch.randn(2, 20, 5).double()[0], torch.randn(20, 3).double()
    actions, log_probabilities = actor.sample(observations, z)
    mean, log_std = actor.net(observations).chunk(2, dim=-1)
    assert log_std.min() < -0.3
    assert log_std.max() > 0.1
    log_std = log_std.clamp(-0.3, 0.1)
    squashed = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform(cache_size=1))
    torch.testing.assert_close(log_probabilities, squashed.log_prob(actions))


def test_the_actor_begins_small() -> None:
    kernels = []
    for scale in (1.0, 0.01):
        torch.manual_seed(0)
        kernels.append(GaussianActor(Spec(5, 3), hidden=(16,), output_scale=scale).net.layers[-1].weight)
    torch.testing.assert_close(kernels[1], kernels[0] / 10)


@pytest.mark.parametrize(("form", "factor"), [("alpha", 0.5), ("log_alpha", 1.0)])
def test_the_temperatures_loss_has_two_forms(form: Any, factor: float) -> None:
    actor = GaussianActor(Spec(5, 3), hidden=(16,), temperature=0.5, temperature_loss=form)
    loss, metrics = actor.loss(torch.randn(8, 5), torch.randn(8, 3), lambda s, a: torch.zeros(2, len(a)))
    loss.backward()
    assert actor.log_temperature.grad is not None
    torch.testing.assert_close(actor.log_temperature.grad, factor * (metrics["entropy"] + 1.5))


def test_the_target_entropy() -> None:
    made = (GaussianActor(Spec(5, 3), (8,), **settings) for settings in ({}, {"target_entropy_multiplier": 1.0}))
    assert [actor.target_entropy for actor in made] == [-1.5, -3.0]
    assert GaussianActor(Spec(5, 3), (8,), target_entropy=-4.0, target_entropy_multiplier=2.0).target_entropy == -4.0


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
    with pytest.raises(UserError, match=r"agent.actor.log_std_range must be \[lowest, highest\], got \[2, -5\]"):
        make("agent.actor.log_std_range=[2,-5]")


def test_runs_from_before_the_aggregate_was_read_go_on_as_they_began() -> None:
    critic = {"_target_": "deflow.modules.critic.Critic", "aggregate": "mean"}
    config = {"agent": {"_target_": "deflow.agents.rlpd.RLPD", "target_members": 2, "critic": critic}}
    assert modernised(config)["agent"]["critic"]["aggregate"] == "min"
    assert (
        modernised({"agent": config["agent"] | {"critic": critic | {"rho": 0.5}}})["agent"]["critic"]["aggregate"]
        == "mean"
    )


def test_stages_that_do_not_fit_name_those_that_do() -> None:
    with pytest.raises(UserError, match=r"parts critic, actor, or use stages=joint, .* or stages=from_scratch"):
        make().begin_stage("behavior", ("behavior_flow",), first_step=0)


def test_stages_that_are_made_for_an_agent_are_named_first() -> None:
    settings = ("experiment=cube_single", "agent=srpo", "networks.hidden=[8]", "agent.behavior.width=8")
    agent = build_agent(compose_config(*settings).agent, Spec(5, 3))
    with pytest.raises(UserError, match=r"use stages=srpo, which is made for it, or stages=joint, "):
        agent.begin_stage("behavior", ("behavior_flow",), first_step=0)


@pytest.mark.usefixtures("short_episodes")
def test_a_run_from_scratch(point_data: Path, tmp_path: Path) -> None:
    overrides = ("experiment=pointmaze", "agent=rlpd", "stages=from_scratch", "online_updates=6")
    summary = train(tiny_config(point_data, *overrides), tmp_path)
    assert summary["stages"] == {"online": 6}
    assert summary["agent"] == "RLPD"


@pytest.mark.parametrize("name", ["rlpd", "rlpd_original", "cal_ql", "rebrac", "iql", "idql", "srpo", "cac"])
def test_a_critic_that_is_a_flow_is_refused(name: str) -> None:
    overrides = (f"agent={name}", "agent/critic=flow", "agent.critic.value_range=[-1,0]", "networks.hidden=[8]")
    with pytest.raises(UserError, match="needs an ensemble of critics: use agent/critic=ensemble"):
        build_agent(compose_config("experiment=cube_single", *overrides).agent, Spec(5, 3))
