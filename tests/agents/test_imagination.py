"""Imagined steps: the critic's longer target, the unrolled policy's gradient and optimum, and how many there are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from deflow import training
from deflow.build import build_agent
from deflow.checks import check
from deflow.errors import UserError
from deflow.flow.ode import Solver
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.constraints import Constraint, Refinement
from deflow.modules.imagination import Decision, Imagination, mean_that_counts
from deflow.modules.one_step import OneStepActor
from deflow.modules.refiner import Refiner
from deflow.modules.statistics import StepStatistics
from deflow.modules.transition_flow import Outcome, TransitionFlow, TransitionModel
from deflow.pipeline import train
from deflow.types import Batch, Metrics, Spec
from tests.agents.tester import check_agent, random_batch
from tests.commands import ROOT
from tests.conftest import compose_config, tiny_config
from tests.test_stopping import Killed, before_call, kill

UNIT: StepStatistics = {
    "observation_mean": [0.0],
    "observation_std": [1.0],
    "change_mean": [0.0],
    "change_std": [1.0],
    "reward_centre": -50.0,
    "reward_scale": 50.0,
}
MODEL_FIRST = ("experiment=pointmaze", "agent/dynamics=gaussian", "agent.dynamics.within=1000", "stages=model_first")
UNROLLED = (
    ("agent=fql", "agent.actor.objective=unrolled"),
    ("agent=deflow", "agent.refiner.objective=unrolled"),
)

COLUMNS = yaml.safe_load((ROOT / "configs" / "tables" / "models.yaml").read_text())["columns"]


def make(*overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


class Linear(TransitionModel):
    r"""Knows the system :math:`s' = A s + B a` with the reward :math:`-(s^T Q s + a^T R a)`, which never ends."""

    A, B = torch.tensor([[1.0, 0.2], [0.0, 0.9]]), torch.tensor([[0.0], [0.3]])
    Q, R = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[1.0]])

    def __init__(self, discount: float = 0.9) -> None:
        super().__init__(Spec(2, 1), UNIT, discount=discount)
        self.reward_range.widen(torch.tensor([-100.0, 0.0]))

    def loss(self, batch: Batch, x_0: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        changes = observations @ self.A.T + actions @ self.B.T - observations
        rewards = (self.reward(observations, actions) - self.reward_centre) / self.reward_scale
        return torch.cat([changes, rewards[:, None], torch.ones_like(rewards)[:, None]], dim=-1)

    def sample(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
        return self._outcome(observations, self(observations, actions, z))

    def reward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return -((observations @ self.Q) * observations).sum(-1) - ((actions @ self.R) * actions).sum(-1)

    @cached_property
    def optimum(self) -> tuple[Tensor, Tensor]:
        """The gain `K` of the optimal `a = -K s`, and `P` of its values `-s^T P s`, by iterating Riccati's equation."""
        P = self.Q
        for _ in range(500):
            K = self.discount * torch.linalg.solve(
                self.R + self.discount * self.B.T @ P @ self.B, self.B.T @ P @ self.A
            )
            P = self.Q + self.discount * self.A.T @ P @ (self.A - self.B @ K)
        return K, P

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The optimal action values, of one member."""
        _, P = self.optimum
        after = observations @ self.A.T + actions @ self.B.T
        return (self.reward(observations, actions) - self.discount * ((after @ P) * after).sum(-1))[None]


def nothing(observations: Tensor, actions: Tensor) -> Tensor:
    return (0.0 * actions[:, 0])[None]


def imagination(model: TransitionModel, size: int, steps: int, generator: torch.Generator | None = None) -> Imagination:
    draws = (torch.randn(size, steps, n, generator=generator) for n in (model.spec.action_dim, model.outcome_dim))
    return Imagination(model, *draws)


def states(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, 2, generator=generator) * 2 - 1


# The optimum of a linear system with quadratic costs.


@pytest.mark.parametrize("steps,discount,knows_values", [(1, 0.9, True), (3, 0.9, True), (10, 0.7, False)])
def test_the_policy_finds_the_optimal_gain(steps: int, discount: float, knows_values: bool) -> None:
    model, generator = Linear(discount), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    actor = OneStepActor(Spec(2, 1), (32, 32), "silu", alpha=1e-6, objective="unrolled", steps=steps)
    assert actor.imagined_steps == steps
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    values: Callable[[Tensor, Tensor], Tensor] = model.values if knows_values else nothing
    for _ in range(250):
        observations, z = states(64, generator), torch.randn(64, 1, generator=generator)
        imagined = imagination(model, 64, steps, generator)
        loss, _ = actor.loss(observations, z, torch.zeros(64, 1), values, imagined, lambda s, z: torch.zeros_like(z))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    observations = 0.8 * states(200, generator)
    optimal = -observations @ model.optimum[0].T
    assert optimal.abs().max() < 1
    error = actor.act(observations, torch.randn(200, 1, generator=generator)) - optimal
    assert error.square().mean().sqrt() < 0.05


def test_the_trust_region_holds_in_every_imagined_step() -> None:
    model, generator = Linear(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    refiner = Refiner(Spec(2, 1), (32, 32), "silu", trust_region=0.01, objective="unrolled", steps=3)
    optimizer = torch.optim.Adam(refiner.parameters(), lr=1e-2)
    still = torch.zeros(64, 1)
    for _ in range(400):
        observations = states(64, generator)
        batch = Batch(observations, still, still[:, 0], still[:, 0], observations, still)
        ahead = model.values, imagination(model, 64, 3, generator), lambda s, z: torch.zeros_like(z)
        loss, metrics = refiner.loss(batch, still, still, *ahead)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    imagined = imagination(model, 512, 3, generator)
    observations, base = states(512, generator), torch.zeros(512, 1)

    def decide(states: Tensor, z: Tensor) -> Decision:
        residual = refiner.residual(states, base)
        return Decision(residual.clamp(-1.0, 1.0), residual)

    first = refiner.residual(observations, base)
    costs = [first, *imagined.unroll(observations, first.clamp(-1.0, 1.0), decide).deviations]
    of_steps = [cost.square().mean().item() for cost in costs]
    assert max(of_steps) == pytest.approx(0.01, rel=0.3)
    assert float(metrics["trust_region/multiplier"]) > 0.1


# Gradients.


def differences(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> None:
    """Compare gradients with central differences, of every third parameter."""
    step = 1e-6
    loss().backward()
    for parameter in parameters:
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(0, len(flat), 3):
            before = flat[index].item()
            ends = []
            for end in (before + step, before - step):
                flat[index] = end
                ends.append(loss().item())
            flat[index] = before
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[index].item(), rel=1e-4, abs=1e-7)


def far_and_slow(observations: Tensor, actions: Tensor) -> Tensor:
    return (observations.square().sum(-1) - actions[:, 0])[None]


@pytest.mark.parametrize("one_step", [False, True])
def test_gradients_of_a_one_step_policy(one_step: bool) -> None:
    torch.manual_seed(0)
    model = TransitionFlow(Spec(2, 1), UNIT, (8,), "silu", one_step=one_step, discount=0.9).double()
    actor = OneStepActor(Spec(2, 1), (8,), "silu", alpha=1e-12, objective="unrolled").double()
    observations, z = torch.randn(4, 2).double(), torch.randn(4, 1).double()
    imagined = Imagination(model, torch.randn(4, 3, 1).double(), torch.randn(4, 3, model.outcome_dim).double())
    differences(lambda: actor.loss(observations, z, z, far_and_slow, imagined, lambda s, z: z)[0], actor.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_a_refiner_through_proposals_that_depend_on_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deflow.modules.refiner.value_scale", lambda q: torch.ones(()))  # it has no gradient
    torch.manual_seed(0)
    model = TransitionFlow(Spec(2, 1), UNIT, (8,), "silu", one_step=True, discount=0.9).double()
    flow = BehaviorFlow(Spec(2, 1), (8,), "silu", solver=Solver(steps=3)).double()
    refiner = Refiner(Spec(2, 1), (8,), "silu", objective="unrolled", lagrange=False, alpha=3.0).double()
    observations, z = torch.randn(4, 2).double(), 0.1 * torch.randn(4, 1).double()
    base = flow.propose(observations, z)
    batch = Batch(observations, base, z[:, 0], z[:, 0], observations, base)
    imagined = Imagination(model, 0.1 * torch.randn(4, 3, 1).double(), torch.randn(4, 3, model.outcome_dim).double())
    differences(
        lambda: refiner.loss(batch, base, base, far_and_slow, imagined, flow.follow)[0], refiner.net.parameters()
    )
    assert all(parameter.grad is None for parameter in (*model.parameters(), *flow.parameters()))
    states = torch.randn(5, 2).double()
    torch.testing.assert_close(
        flow.follow(states, torch.zeros(5, 1).double()), flow.propose(states, torch.zeros(5, 1).double())
    )


def test_distillation_has_no_gradient_into_the_states_that_are_reached() -> None:
    torch.manual_seed(0)
    model, seen = Linear(), []
    actor = OneStepActor(Spec(2, 1), (8,), "silu", objective="unrolled", steps=2)

    def propose(states: Tensor, z: Tensor) -> Tensor:
        seen.append(states.requires_grad)
        return torch.zeros_like(z)

    z = torch.zeros(4, 1)
    actor.loss(torch.randn(4, 2), z, z, model.values, imagination(model, 4, 2), propose)
    assert seen == [False, False]


def test_memory_grows_by_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def kept_by(steps: int) -> int:
        torch.manual_seed(0)
        model = TransitionFlow(Spec(2, 1), UNIT, (256, 256), "silu")
        actor = OneStepActor(Spec(2, 1), (8,), "silu", objective="unrolled", steps=steps)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            z = torch.zeros(64, 1)
            ahead = nothing, imagination(model, 64, steps), lambda s, z: z
            actor.loss(torch.zeros(64, 2), z, z, *ahead)
        return sum(kept)

    assert (kept_by(8) - kept_by(2)) / 6 < 64 * 256  # of a single hidden layer; a step has 20 of them


# The critic's target.


def test_the_target_with_imagined_steps() -> None:
    agent = make("agent=fql", "agent/dynamics=gaussian", "agent.dynamics.expansion=2")
    model, batch = agent.dynamics, random_batch(agent)
    noise = agent.noise(batch, "test")
    assert noise.imagined.shape == (16, 2, 3 + model.outcome_dim)
    losses = {part: loss for part, loss, _ in agent.losses(batch, noise)}  # from here on the model knows these rewards
    with torch.no_grad():
        next_actions = agent.actor.act(batch.next_observations, noise.z_next)
        longer, last_actions = agent.expanded(batch, next_actions, noise, agent.actor.act)
        rewards, discounts, at, actions = batch.rewards, batch.discounts, batch.next_observations, next_actions
        goes_on = torch.ones_like(rewards)
        for step in range(2):
            z, outcome_noise = noise.imagined[:, step].split([3, model.outcome_dim], -1)
            outcome = model.imagine(at, actions, outcome_noise)
            rewards = rewards + discounts * outcome.rewards
            discounts = discounts * 0.99 * outcome.continues
            at = torch.where(goes_on[:, None] > 0, outcome.observations, at)
            goes_on, actions = goes_on * outcome.continues, agent.actor.act(at, z)
    torch.testing.assert_close(longer.rewards, rewards)
    torch.testing.assert_close(longer.discounts, discounts)
    torch.testing.assert_close(longer.next_observations, at)
    torch.testing.assert_close(last_actions, actions)
    assert longer.observations is batch.observations
    assert (longer.discounts[batch.discounts == 0] == 0).all()
    expected = agent.critic.loss(longer, last_actions, noise.levels)[0]
    assert torch.equal(losses["critic"], expected)


def test_what_comes_after_the_end_cannot_overflow() -> None:
    class Exploding(Linear):
        """Ends beyond 5, where its states are squared."""

        def sample(self, *arguments: Tensor) -> Outcome:
            raise NotImplementedError

        def imagine(self, observations: Tensor, actions: Tensor, z: Tensor) -> Outcome:
            after = torch.where(observations.abs() > 5, observations.pow(9), observations + 1)
            return Outcome(after, after.sum(-1), (after[:, 0] < 5).float())

    start = torch.tensor([[4.5, 4.5], [-2.0, -2.0]], requires_grad=True)
    imagination = Imagination(Exploding(), torch.zeros(2, 6, 1), torch.zeros(2, 6, 4))
    still = Decision(torch.zeros(2, 1), torch.zeros(2, 1))
    imagined = imagination.unroll(start, torch.zeros(2, 1), lambda observations, z: still)
    assert imagined.observations.tolist() == [[5.5, 5.5], [4.0, 4.0]]
    imagined.value(lambda s, a: s.square().sum(-1)).sum().backward()
    assert start.grad is not None
    assert start.grad.isfinite().all()


def test_imagined_rewards_stay_in_the_range_of_the_data() -> None:
    model = Linear()
    far = torch.full((1, 2), 100.0)
    assert model.imagine(far, far[:, :1], torch.zeros(1, 4)).rewards.item() == -100.0
    assert model.sample(far, far[:, :1], torch.zeros(1, 4)).rewards.item() < -1000.0


@pytest.mark.parametrize("agent", ["deflow", "fql", "fawac", "fbrac"])
def test_shared_checks_of_value_expansion(agent: str) -> None:
    check_agent(make(f"agent={agent}", "agent/dynamics=flow", "agent.dynamics.expansion=2"))


@pytest.mark.parametrize("model", ["flow", "gaussian", "flow agent.dynamics.one_step=true"])
@pytest.mark.parametrize("overrides", UNROLLED)
def test_shared_checks_of_unrolled_policies(overrides: tuple[str, ...], model: str) -> None:
    check_agent(make(*overrides, *f"agent/dynamics={model}".split(), "agent.dynamics.expansion=1"))


@pytest.mark.parametrize("agent", ["deflow", "fql"])
def test_no_steps_are_as_without_a_model(agent: str) -> None:
    without = make(f"agent={agent}")
    part = "refiner" if agent == "deflow" else "actor"
    allowed = make(f"agent={agent}", "agent/dynamics=flow", f"agent.{part}.objective=unrolled")
    allowed.allowed_steps = 0
    batch = random_batch(without)
    losses, of_none = (
        {name: loss for name, loss, _ in one.losses(batch, one.noise(batch, "test"))} for one in (without, allowed)
    )
    for name, loss in losses.items():
        assert torch.equal(loss, of_none[name]), name


def test_the_refiners_proposals_have_a_gradient_into_imagined_states() -> None:
    agent = make("agent=deflow", "agent/dynamics=gaussian", "agent.refiner.objective=unrolled", "agent.refiner.steps=2")
    follow, seen = agent.behavior_flow.follow, []

    def noticed(observations: Tensor, z: Tensor) -> Tensor:
        proposals = follow(observations, z)
        seen.append((observations.requires_grad, proposals.requires_grad))
        return proposals

    agent.behavior_flow.follow = noticed
    batch = random_batch(agent)
    list(agent.losses(batch, agent.noise(batch, "test")))
    assert seen == [(True, True)] * 2


class Ending(Linear):
    """Ends the task with the first step from a state whose first number is above 0."""

    def forward(self, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
        outcome = super().forward(observations, actions, z)
        return torch.cat([outcome[:, :-1], torch.where(observations[:, :1] > 0, -1.0, 1.0)], dim=-1)


def far_left_and_right(right: int) -> Tensor:
    """Eight states that stay where they are within a few steps, so many of which are on the right."""
    return torch.tensor([[-10.0, 0.0]] * (8 - right) + [[10.0, 0.0]] * right)


@pytest.mark.parametrize("ending", [0, 6, 8])
def test_what_would_come_after_the_end_does_not_count(ending: int) -> None:
    imagined = imagination(Ending(), 8, 3).unroll(
        far_left_and_right(ending), torch.zeros(8, 1), lambda s, z: Decision(torch.zeros_like(z), torch.ones_like(z))
    )
    goes_on = torch.arange(8) < 8 - ending
    assert torch.equal(imagined.counts, goes_on.float().expand(3, 8))
    assert torch.equal(imagined.discounts > 0, goes_on)
    squares = mean_that_counts(imagined.deviations.square(), imagined.counts)
    assert torch.equal(squares, torch.full((3, 1), float(ending < 8)))


@pytest.mark.parametrize("ending", [0, 6, 8])
def test_means_over_what_counts(ending: int) -> None:
    states, still = far_left_and_right(ending), torch.zeros(8, 1)
    ahead = nothing, imagination(Ending(), 8, 3), lambda s, z: torch.zeros_like(z)

    # Every action of the one-step policy is 1 away from what the flow proposes.
    actor = OneStepActor(Spec(2, 1), (4,), "silu", objective="unrolled")
    refiner = Refiner(Spec(2, 1), (4,), "silu", objective="unrolled")
    for net in (actor.net, refiner.net):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
            net.layers[-1].bias.fill_(1.0)  # type: ignore[union-attr, operator]
    _, metrics = actor.loss(states, still, still, *ahead)
    assert metrics["distillation"].item() == pytest.approx(1.0)

    # And so is every action of the refiner.
    batch = Batch(states, still, still[:, 0], still[:, 0], states, still)
    _, metrics = refiner.loss(batch, still, still, *ahead)
    assert metrics["trust_region/cost"].item() == pytest.approx(1.0)


def test_the_trust_region_is_of_the_rollouts_that_go_on() -> None:
    residual = torch.tensor([0.1, 0.1, 0.3, 9.0])[:, None].expand(2, 4, 1)
    counts = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    still = torch.zeros(4, 1)
    _, _, metrics = Constraint("trust_region", 0.01).loss(Refinement(residual, still, still, still, counts))
    assert metrics["cost"].item() == pytest.approx(0.09)  # of the last step, in which one is left


# Settings and stages.


@pytest.mark.parametrize("column", [name for name, settings in COLUMNS.items() if "stages=model_first" in settings])
def test_the_table_of_models_is_of_agents_that_there_are(column: str) -> None:
    config = compose_config("experiment=pointmaze", *COLUMNS[column])
    check(config)
    with torch.device("meta"):
        build_agent(config.agent, Spec(5, 3))


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("overrides", [*UNROLLED, ("agent=fawac", "agent.dynamics.expansion=3")])
def test_a_model_first_and_steps_within_its_errors(
    overrides: tuple[str, ...], point_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(point_data, *MODEL_FIRST, *overrides)
    with caplog.at_level(logging.INFO):
        summary = train(config, tmp_path)
    assert "imagined steps: 3 of the 3 asked for" in caplog.text
    assert summary["dynamics"]["imagined_steps_allowed"] == 3
    assert summary["evaluations"] >= 1
    assert np.isfinite(summary["dynamics"]["error"]["sample"]["1"])


@pytest.mark.usefixtures("short_episodes")
def test_a_limit_without_anything_to_measure(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "steps_within", lambda *_: (0, []))
    with caplog.at_level(logging.INFO):
        train(tiny_config(point_data, *MODEL_FIRST, *UNROLLED[0]), tmp_path)
    assert "imagined steps: 0 of the 3 asked for; no error can be measured, as every task" in caplog.text


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize(("moment", "number"), [("update", 7), ("report", 1)])
def test_a_limit_is_measured_once(
    moment: str, number: int, point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "steps_within", lambda *_: (1, [0.5]))
    with pytest.MonkeyPatch.context() as patch:
        before_call(patch, moment, number, kill)
        with pytest.raises(Killed):
            train(tiny_config(point_data, *MODEL_FIRST, *UNROLLED[0]), tmp_path)
    assert (tmp_path / "checkpoints" / "1_joint" / ("last.ckpt" if moment == "update" else "final.ckpt")).exists()
    monkeypatch.setattr(training, "steps_within", lambda *_: (2, [0.5]))
    assert train(compose_config(f"resume={tmp_path}"), tmp_path)["dynamics"]["imagined_steps_allowed"] == 1


@pytest.mark.parametrize(
    "overrides,message",
    [
        (("agent=fql", "agent.actor.objective=unrolled"), "add agent/dynamics=flow"),
        (("agent=deflow", "agent.refiner.objective=unrolled"), "add agent/dynamics=flow"),
        (("agent=ifql", "agent/dynamics=flow", "agent.dynamics.expansion=1"), "IFQL has none"),
        (("agent=fql", "agent/dynamics=flow", "agent.dynamics.expansion=1", "agent/critic=floq"), "one target"),
        (("agent=fql", "agent/dynamics=flow", "agent.dynamics.expansion=1", "agent/critic=occupancy"), "one target"),
    ],
)
def test_what_does_not_fit_together(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(*overrides)


@pytest.mark.parametrize(
    "override,message",
    [
        ("agent.dynamics.expansion=-1", "agent.dynamics.expansion must be a whole number of at least 0"),
        ("agent.dynamics.within=0", "agent.dynamics.within must be"),
        ("agent.actor.steps=0", "agent.actor.steps must be a whole number of at least 1"),
        ("agent.actor.objective=values", "value or unrolled"),
        ("agent.dynamics.discount=0.5", "agent.dynamics has the discount 0.5"),
    ],
)
def test_settings(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(compose_config("experiment=pointmaze", "agent=fql", "agent/dynamics=flow", override))


@pytest.mark.parametrize(
    ("train", "steps"), [("behavior_flow", (0, 0)), ("critic", (2, 0)), ("actor", (0, 3)), ("dynamics", (0, 0))]
)
def test_a_limit_holds_for_what_trains(train: str, steps: tuple[int, int]) -> None:
    limited = ("agent/dynamics=gaussian", "agent.dynamics.expansion=2", "agent.dynamics.within=0.5")
    agent = make("agent=fql", "agent.actor.objective=unrolled", *limited)
    agent.begin_stage("test", [train], first_step=0)
    assert agent.steps_of_stage == steps
    assert agent.limits_steps == any(steps)


def test_a_limit_needs_a_model_at_rest(point_data: Path, tmp_path: Path) -> None:
    limited = ("agent=fql", "agent/dynamics=flow", "agent.dynamics.within=0.1", "agent.dynamics.expansion=1")
    with pytest.raises(UserError, match="in 'joint' the model trains"):
        train(tiny_config(point_data, "experiment=pointmaze", *limited), tmp_path)


def test_a_limit_needs_validation(point_data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(60, 2)),
        "actions": rng.uniform(-1, 1, (60, 2)),
        "rewards": np.zeros(60),
    }
    np.savez(tmp_path / "alone.npz", **columns, terminals=np.arange(60) == 59)
    imagined = ("agent=fql", "agent/dynamics=flow", "agent.dynamics.expansion=59", "+stages.joint.freeze=[dynamics]")
    own = ("task=custom", f"data.source.path={tmp_path / 'alone.npz'}", *imagined)
    with pytest.raises(UserError, match="needs validation trajectories"):
        train(tiny_config(point_data, *own, "agent.dynamics.within=0.1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"100 imagined steps .* are more than the \d+ of the longest"):
        train(tiny_config(point_data, *own, "agent.dynamics.expansion=100"), tmp_path / "run")
