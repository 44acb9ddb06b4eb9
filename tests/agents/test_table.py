"""The Gaussian, diffusion and consistency baselines of the papers' tables: the shared checks and a run of each."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from deflow.agents.base import Agent
from deflow.agents.srpo import ScoreActor
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent, loss_of, random_batch
from tests.conftest import compose_config, tiny_config

SMALL = {
    "bc": (),
    "iql": (),
    "idql": ("agent.behavior.width=8", "agent.critic.hidden=[16,16]", "agent.value.hidden=[16,16]"),
    "srpo": ("agent.behavior.width=8", "agent.critic.hidden=[16,16]", "agent.value.hidden=[16,16]"),
    "cac": ("agent.actor.hidden=[16,16]", "agent.critic.hidden=[16,16]"),
}


def make(agent: str, *overrides: str, spec: Spec = Spec(5, 3)) -> Any:  # noqa: B008 (frozen)
    torch.manual_seed(0)
    settings = ["experiment=cube_single", f"agent={agent}", "networks.hidden=[16,16]", *SMALL[agent], *overrides]
    return build_agent(compose_config(*settings).agent, spec)


@pytest.mark.parametrize("agent", SMALL)
def test_shared_checks(agent: str) -> None:
    check_agent(make(agent))


@pytest.mark.parametrize(
    "choice",
    [
        "bc agent.actor.std=null agent.actor.squash=true agent.actor.dropout=0.1",
        "iql agent.actor.extraction=ddpgbc agent.actor.alpha=0.3",
        "idql agent.behavior.dropout=0 agent.behavior.ema=null",
        "srpo agent.actor.normalise=true",
        "cac agent.normalise_target=true agent.actor.steps=3",
    ],
)
def test_shared_checks_of_choices(choice: str) -> None:
    check_agent(make(*choice.split()))


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("agent", SMALL)
def test_a_run(agent: str, point_data: Path, tmp_path: Path) -> None:
    stages = "srpo" if agent == "srpo" else "joint"
    config = tiny_config(point_data, "experiment=pointmaze", f"agent={agent}", f"stages={stages}", *SMALL[agent])
    summary = train(config, tmp_path)
    assert summary["agent"].lower() == agent
    assert summary["evaluations"] >= 1


@pytest.mark.parametrize(("critics", "values"), [("online", "values"), ("target", "target_values")])
def test_iql_weighs_imitation_by_the_advantage_of_the_smaller_value(critics: str, values: str) -> None:
    agent = make("iql", "agent.actor.alpha=2", f"agent.actor.advantage={critics}")
    batch = random_batch(agent)
    setattr(agent.critic, values, lambda s, a: torch.stack([a[:, 0], a[:, 0] + 1]))
    agent.value.forward = lambda s: s[:, 0]
    weights = (2 * (batch.actions[:, 0] - batch.observations[:, 0])).exp().clamp(max=100)
    errors = (agent.actor.mean(batch.observations) - batch.actions).square().sum(-1) / 2
    expected = (weights * (errors + 1.5 * math.log(2 * math.pi))).mean()
    _, loss, _ = loss_of(agent, "actor", batch, agent.noise(batch))
    torch.testing.assert_close(loss, expected)


def test_gaussians_act_with_the_mean_and_explore_around_it() -> None:
    for name in ("bc", "iql"):
        agent = make(name, "agent.actor.std=0.1")
        observations, z = torch.randn(4, 5), torch.randn(4, 3)
        acted = agent.act(observations, z)
        assert torch.equal(acted, agent.act(observations, -z))
        torch.testing.assert_close(agent.explore(observations, z), (acted + 0.1 * z).clamp(-1, 1))


def test_a_deviation_that_is_given_is_taken_as_it_is_and_a_learned_one_is_kept_in_bounds() -> None:
    for std in (1e-4, 20.0):
        torch.testing.assert_close(make("bc", f"agent.actor.std={std}").actor.std, torch.full((3,), std))
    learned = make("bc", "agent.actor.std=null").actor
    learned.log_std.data.fill_(-20.0)
    torch.testing.assert_close(learned.std, torch.full((3,), math.exp(-5.0)))


def test_dropout_is_drawn_with_the_noise() -> None:
    agent, batch = make("bc", "agent.actor.dropout=0.5"), random_batch(make("bc"))
    one, same, other = (agent.noise(batch, number) for number in (0, 0, 1))
    assert torch.equal(one.keep, same.keep)
    assert not torch.equal(one.keep, other.keep)
    assert one.keep.float().mean().item() == pytest.approx(0.5, abs=0.1)
    losses = [loss_of(agent, "actor", batch, noise)[1].item() for noise in (one, same, other)]
    assert losses[0] == losses[1] != losses[2]


def test_validation_is_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = make("bc", "agent.actor.dropout=0.5"), random_batch(make("bc"))
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(agent, "log_dict", lambda values, **settings: logged.update(values))
    agent.validation_step(batch, 0)
    _, expected, _ = next(iter(agent.losses(batch, agent.noise(batch, 0)._replace(keep=None))))
    assert logged["val/actor/loss"] == expected


def test_idql_takes_the_sample_with_the_highest_smaller_target_value() -> None:
    agent = make("idql", "agent.best_of_n=6").eval()
    observations, z = torch.randn(4, 5), torch.randn(4, 5, 6, 3)
    samples = torch.stack([agent.behavior.sample(observations, z[:, :, i].movedim(0, 1)) for i in range(6)], dim=1)
    values = torch.stack([agent.critic.target_values(observations, samples[:, i]).amin(0) for i in range(6)], dim=1)
    torch.testing.assert_close(agent.act(observations, z), samples[torch.arange(4), values.argmax(1)])
    torch.testing.assert_close(agent.propose(observations, z), samples[:, 0])


def test_idqls_values_learn_from_a_share_of_the_batch() -> None:
    agent = make("idql", "agent.value_share=0.25")
    batch = random_batch(agent)
    noise = agent.noise(batch)
    observations, actions = batch.observations[::4], batch.actions[::4]  # of the whole of it: online the ends differ
    expected = agent.value.loss(observations, agent.critic.target_values(observations, actions))[0]
    torch.testing.assert_close(loss_of(agent, "value", batch, noise)[1], expected)


def test_a_denoiser_that_knows_the_noise_finds_the_action() -> None:
    # With the true noise of a single action predicted, the last of the chain's steps lands on that action.
    diffusion, action = make("idql").behavior, torch.tensor([0.3, -0.6, 0.9])

    def noise_in(features: torch.Tensor, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        signal, sigma = diffusion.levels(times.long())
        return (x - signal * action) / sigma

    diffusion.net.forward = noise_in
    sampled = diffusion.sample(torch.zeros(8, 5), torch.randn(5, 8, 3))
    torch.testing.assert_close(sampled, action.expand(8, 3), rtol=0, atol=1e-5)


def test_srpos_policy_goes_where_score_and_value_say() -> None:
    agent = make("srpo", "agent.actor.beta=0.5")
    batch, noise = random_batch(agent), agent.noise(random_batch(agent))
    agent.behavior.noise = lambda s, noisy, times: noisy + noise.z  # a score that is linear in the noisy action
    agent.critic.target_values = lambda s, a: torch.stack([3 * a[:, 0], a[:, 0]])  # its mean climbs by 2 in dimension 0
    actions = agent.actor(batch.observations)
    signal, sigma = agent.behavior.levels(noise.times)
    error = signal * actions.detach() + sigma * noise.z  # of the prediction: z is no part of it
    expected = (sigma.square() * error * actions).sum(-1).mean() - 0.5 * 2 * actions[:, 0].mean()
    torch.testing.assert_close(loss_of(agent, "actor", batch, noise)[1], expected)


def test_srpos_baseline_changes_the_spread_of_its_gradient_and_not_the_mean() -> None:
    # The data's actions are standard normal, whose true score says: noise = sigma x. So the mean gradient is known.
    actors = [make("srpo", f"agent.actor.baseline={baseline}").actor for baseline in ("true", "false")]
    observations = torch.zeros(4096, 5)
    generator = torch.Generator().manual_seed(0)
    times, z = 0.02 + 0.96 * torch.rand(4096, 1, generator=generator), torch.randn(4096, 3, generator=generator)
    behavior = make("srpo").behavior
    behavior.noise = lambda s, noisy, times: behavior.levels(times)[1] * noisy
    signal, sigma = behavior.levels(times)

    def gradients(actor: ScoreActor) -> torch.Tensor:
        """Of the loss by each transition's action, shape (batch, action_dim)."""
        actions = actor(observations).detach().requires_grad_()
        actor.forward = lambda s: actions
        loss, _ = actor.loss(observations, times, z, behavior, lambda s, a: 0 * a.sum(-1).expand(2, -1))
        return len(actions) * torch.autograd.grad(loss, actions)[0]

    with_baseline, without = (gradients(actor) for actor in actors)
    expected = (sigma**3 * signal).mean() * actors[0](observations)[0]
    for found in (with_baseline, without):
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert (with_baseline.var(0) < 0.1 * without.var(0)).all()


def test_the_consistency_function_is_the_identity_at_the_lowest_level() -> None:
    policy = make("cac").actor
    x, features = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(policy._denoise(policy.online, features, x, torch.full((4, 1), 0.002)), x)


def test_cacs_teacher_rests_and_then_moves_in_every_fifth_update() -> None:
    agent = make("cac")
    agent.begin_stage("test", "all", first_step=0)

    def moving(step: int) -> tuple[bool, bool]:
        agent.begin_update(step)
        return agent.moves_targets("critic"), agent.moves_targets("actor")

    assert [moving(step) for step in (0, 995, 999, 1000, 1001, 1005)] == [
        (True, teacher) for teacher in (False, False, False, True, False, True)
    ]
    agent.begin_stage("later", "all", first_step=2000)  # updates of the whole run count
    assert moving(0) == (True, True)


def test_cac_draws_more_boundaries_as_it_goes_and_begins_anew() -> None:
    agent, batch = make("cac"), random_batch(make("cac"), size=256)
    agent.begin_stage("test", "all", first_step=0)

    def levels(step: int) -> int:
        agent.begin_update(step)
        lower, upper = agent.noise(batch, step).levels.T
        assert (lower < upper).all()
        return len(lower.unique())

    assert levels(0) == 1
    assert levels(49_999) > 80
    assert levels(50_000) == 1


def test_cac_takes_the_better_samples_more_often() -> None:
    agent = make("cac", "agent.best_of_n=2")
    agent.actor.sample = lambda s, z: z[0].clamp(-1, 1)
    agent.critic.target_values = lambda s, a: a[:, 0].expand(2, -1)
    rows = 4000
    z = torch.randn(rows, 2, 7, generator=torch.Generator().manual_seed(0))
    z[:, 0, 0], z[:, 1, 0] = 1.0, 0.0
    taken = agent.act(torch.zeros(rows, 5), z)[:, 0]
    assert taken.mean().item() == pytest.approx(math.e / (1 + math.e), abs=0.02)  # the softmax of 1 and 0


def test_cac_needs_two_critics() -> None:
    with pytest.raises(UserError, match=r"climbs one of two critics: set agent\.critic\.members=2, not 3"):
        make("cac", "agent.critic.members=3")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("iql agent.actor.alpha=-1", "agent.actor.alpha must be a number of at least 0, got -1"),
        ("iql agent.actor.advantage=both", "agent.actor.advantage must be online or target, got 'both'"),
        ("iql agent.actor.extraction=bc", "agent.actor.extraction must be awr or ddpgbc, got 'bc'"),
        ("cac agent.eta=-0.1", "agent.eta must be a number of at least 0, got -0.1"),
        ("cac agent.actor.steps=0", "agent.actor.steps must be a whole number of at least 1, got 0"),
        ("cac agent.best_of_n=0", "agent.best_of_n must be a whole number of at least 1, got 0"),
        ("idql agent.best_of_n=0", "agent.best_of_n must be a whole number of at least 1, got 0"),
        ("idql agent.behavior.steps=0", "agent.behavior.steps must be a whole number of at least 1, got 0"),
        ("idql agent.behavior.ema=1", "agent.behavior.ema must be a number of at least 0 and below 1 or null, got 1"),
        (
            "idql agent.behavior.time_features=5",
            "agent.behavior.time_features must be a whole number of at least 4 and a multiple of 2, got 5",
        ),
        ("srpo agent.actor.beta=0", "agent.actor.beta must be a number above 0, got 0"),
        ("bc agent.actor.std=0", "agent.actor.std must be a number above 0 or null, got 0"),
        ("bc agent.actor.dropout=1", "agent.actor.dropout must be a number of at least 0 and below 1, got 1"),
    ],
)
def test_impossible_settings(setting: str, says: str) -> None:
    agent, override = setting.split()
    with pytest.raises(UserError, match=re.escape(says)):
        make(agent, override)


def test_an_image_is_seen_by_every_part() -> None:
    spec = Spec(2 * 8 * 8 * 3, 3, image=(2, 8, 8, 3))
    for name in SMALL:
        check_agent(make(name, "networks.encoder.stacks=[2,2]", "networks.encoder.features=8", spec=spec))


def test_a_flat_value_leaves_srpos_loss_finite() -> None:
    agent = make("srpo", "agent.actor.normalise=true")
    batch = random_batch(agent)
    agent.critic.target_values = lambda s, a: 0 * a.sum(-1).expand(2, -1)
    assert loss_of(agent, "actor", batch, agent.noise(batch))[1].isfinite()


def test_srpo_all_at_once_is_said(caplog: pytest.LogCaptureFixture) -> None:
    agent = make("srpo")
    for parts, said in ((["behavior"], 0), (["critic", "value"], 0), (["actor"], 0), ("all", 1)):
        agent.begin_stage("joint", parts, first_step=0)
        assert caplog.text.count("stages=srpo does it after") == said


def test_a_frozen_part_gives_its_average() -> None:
    agent = make("srpo", "agent.behavior.ema=0.9")
    network, average = agent.behavior.net, agent.behavior.average
    assert average.of(network) is network
    agent.begin_stage("policy", ["actor"], first_step=0)
    assert average.of(network) is average.network
    agent.begin_stage("behavior", ["behavior"], first_step=0)
    assert average.of(network) is network


@pytest.mark.parametrize(
    ("chosen", "setting", "values"),
    [
        # CORL's own code, where the tables copy its cells.
        ("agent=iql", "agent.actor.advantage", {"pen-human-v1": "target", "scene": "online"}),
        (
            "agent=rebrac stages=offline_to_online",
            "stages.online.environment.online_share",
            {"antmaze-umaze-v2": 0.5, "door-cloned-v1": 0.5, "scene": None},
        ),
        # The minimum where the papers' common protocol has it.
        ("agent=fawac", "agent.critic.aggregate", {"antmaze_giant": "min", "pen-human-v1": "min", "scene": "mean"}),
        ("agent=fbrac", "agent.critic.aggregate", {"antmaze_giant": "min", "pen-human-v1": "min", "scene": "mean"}),
        ("agent=fql stages=offline_to_online", "agent.critic.aggregate", {"pen-cloned-v1": "min", "scene": "mean"}),
        # By the name, as the original code does.
        (
            "agent=srpo stages=srpo",
            "agent.actor.normalise",
            {"humanoidmaze_medium": True, "antsoccer_arena": False, "cube_single": False},
        ),
        # The policy's rate alone.
        ("agent=cac", "agent.optimizer.lr", {"pen-human-v1": 3e-4, "scene": 3e-4}),
        ("agent=cac", "agent.optimizer.parts", {"pen-human-v1": {"actor": {"lr": 3e-5}}, "scene": {}}),
        # FQL's runs of it, not its own.
        ("agent=cac", "agent.normalise_target", {"pen-human-v1": False}),
    ],
)
def test_what_papers_tuned_beside_their_tables(chosen: str, setting: str, values: dict[str, object]) -> None:
    for task, expected in values.items():
        assert OmegaConf.select(compose_config(f"task={task}", *chosen.split()), setting) == expected, task


def test_srpos_schedule_follows_the_updates() -> None:
    stages = compose_config("task=scene", "agent=srpo", "stages=srpo", "updates=10").stages
    assert [stage.steps for stage in stages.values()] == [20, 15, 10]


@pytest.mark.parametrize("agent", ["idql", "cac"])
def test_a_resumed_run_goes_on_to_the_same_bits(
    agent: str, point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["experiment=pointmaze", f"agent={agent}", *SMALL[agent], "checkpoint_every=2"]
    settings += ["++stages.joint.cosine_decay=true", "eval.every=100"]
    train(tiny_config(point_data, *settings), tmp_path / "whole")
    training_step = Agent.training_step

    def dies(agent: Agent, batch: object, batch_idx: int) -> torch.Tensor:
        if agent.global_step == 3:
            raise SystemExit("killed")
        return training_step(agent, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Agent, "training_step", dies)
        with pytest.raises(SystemExit):
            train(tiny_config(point_data, *settings), tmp_path / "killed")
    train(compose_config(f"resume={tmp_path / 'killed'}"), tmp_path / "killed")
    final = "checkpoints/0_joint/final.ckpt"
    whole, resumed = (torch.load(tmp_path / name / final)["state_dict"] for name in ("whole", "killed"))
    for name, expected in whole.items():
        assert torch.equal(resumed[name], expected), name
