"""The occupancy flow: known futures and values, what each objective learns from, units, and what is refused."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from deflow.build import build_agent
from deflow.checks import check
from deflow.errors import UserError
from deflow.flow.ode import Solver
from deflow.modules.critic import Aggregate
from deflow.modules.occupancy_flow import Objective, OccupancyFlow, Pair
from deflow.modules.statistics import StateStatistics
from deflow.nets.mlp import EnsembleMLP
from deflow.types import Batch, Spec
from tests.commands import ROOT
from tests.conftest import compose_config

UNIT: StateStatistics = {
    "observation_mean": [0.0],
    "observation_std": [1.0],
    "reward_centre": -0.5,
    "reward_scale": 0.5,
}
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(ROOT / "studies"))
    try:
        import occupancy
    finally:
        sys.path.pop(0)
    return occupancy


SPEC = Spec(2, 1)


def make(spec: Spec = SPEC, discount: float = 0.9, **settings: Any) -> OccupancyFlow:
    torch.manual_seed(0)
    return OccupancyFlow(spec, settings.pop("statistics", UNIT), discount, hidden=(8,), **settings)


def steps(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    states, after = torch.randn(2, size, 2, generator=generator)
    actions = torch.rand(size, 1, generator=generator) * 2 - 1
    goes_on = (torch.arange(size) % 3 > 0).float()
    return Batch(states, actions, -goes_on, 0.9 * goes_on, after, actions)


@pytest.mark.parametrize("discount", [0.9, 0.999])
def test_values_are_in_units_of_the_largest_reward(discount: float) -> None:
    # Whatever the discount: where the end alone earns, no value is larger than that.
    batch = steps()
    critic = make(discount=discount, statistics=UNIT | {"reward_centre": 1.0, "reward_scale": 2.0})
    values = critic.values(batch.observations, batch.actions)
    torch.testing.assert_close(values, 3 * critic.q(batch.observations, batch.actions).squeeze(-1))
    torch.testing.assert_close(values, critic.frozen_values(batch.observations, batch.actions))


@pytest.mark.parametrize("name", ["line", "line, goal", "grid"])
def test_the_closed_form_is_what_steps_lead_to(study: Any, name: str) -> None:
    system, discount = study.SYSTEMS[name](), 0.8
    occupancy, states = system.occupancy(discount), len(system.positions)
    torch.testing.assert_close(occupancy.sum(-1), torch.ones(occupancy.shape[:2]))
    # Of steps that go on each costs 1, or earns nothing; the end earns nothing, or 1.
    ended, on = occupancy[..., :states].sum(-1), occupancy[..., states:].sum(-1)
    torch.testing.assert_close(system.values(discount), ended if "goal" in name else -on / (1 - discount))
    # By rolling out, from the middle and to the right.
    generator, at, chances = torch.Generator().manual_seed(0), states // 2, torch.zeros(2 * states)
    for _ in range(2000):
        state, action = at, 1
        while True:
            after = int(torch.multinomial(system.steps[action, state], 1, generator=generator))
            goes_on, state = bool(system.goes_on[state, after]), after
            if not goes_on or torch.rand((), generator=generator) < 1 - discount:
                break
            action = int(torch.rand((), generator=generator) < study.RIGHT)
        chances[state + states * goes_on] += 1 / 2000
    assert study.total_variation(chances, occupancy[1, at]) < 0.06


@pytest.mark.parametrize("goal", [False, True])
def test_it_learns_a_known_future_and_its_values(goal: bool, study: Any) -> None:
    system = study.System.line(goal=goal)
    critic = study.trained(system, discount=0.8, updates=400, lr=3e-3)
    found = study.measured(system, critic)
    assert found["total variation"] < 0.3  # 0.12 after 4000 updates; as many samples of the truth are at 0.04
    assert found["correlation"] > 0.97
    assert found["error"] < 0.1
    beside_the_end = system.positions[-2].expand(2, 1)
    left, right = critic.values(beside_the_end, torch.tensor([[-1.0], [1.0]]))[0]
    assert right > left  # also where the reward comes with the step that ends the task


def test_without_discount_the_future_is_the_next_state(study: Any) -> None:
    system = study.System.line()
    critic = study.trained(system, discount=0.0, updates=400, lr=3e-3)
    expected = torch.cat([(1 - system.goes_on) * system.steps, system.goes_on * system.steps], -1)
    torch.testing.assert_close(system.occupancy(0.0), expected)
    assert study.measured(system, critic)["total variation"] < 0.2


def still(critic: OccupancyFlow, velocity: Tensor) -> OccupancyFlow:
    """With a target field of this velocity everywhere, and an online one of 0."""
    with torch.no_grad():
        for parameter in (*critic.online.parameters(), *critic.target.parameters()):
            parameter.zero_()
        critic.target.layers[-1].bias.copy_(velocity.expand(critic.target.members, 1, -1))  # type: ignore[union-attr, operator]
    return critic


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_each_objective_learns_from(objective: Objective) -> None:
    velocity = torch.tensor([1.0, -2.0, 0.5])
    critic, batch = still(make(objective=objective, samples=2, solver=Solver(steps=3)), velocity), steps()
    draws = critic._draws(torch.rand(6, critic.levels))
    there = torch.cat([batch.next_observations, batch.actions], -1).split([2, 1], -1)
    pair = Pair(*there)
    ahead = critic._ahead(pair, draws.there)
    torch.testing.assert_close(ahead[0], draws.there + velocity)
    points, velocities = critic._later(pair, draws, ahead)
    if objective == "td2_cfm":
        expected = draws.starts + draws.times * velocity, velocity.expand(6, -1)
    elif objective == "td_cfm_coupled":
        expected = draws.there[:, 0] + draws.times * velocity, velocity.expand(6, -1)
    else:
        way = draws.there[:, 0] + velocity - draws.starts
        expected = draws.starts + draws.times * way, way
    torch.testing.assert_close(points[0], expected[0])
    torch.testing.assert_close(velocities[0], expected[1])


@pytest.mark.parametrize("discount", [0.9, 0.0])
def test_the_two_terms_are_weighed_by_discount_and_mask(discount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    velocity = torch.tensor([1.0, -2.0, 0.5])
    critic, batch = still(make(samples=1, discount=discount), velocity), steps()
    levels = torch.rand(6, critic.levels)
    asked, velocity_of = [], critic._velocity

    def seen(field: EnsembleMLP, pair: Pair, points: Tensor, times: Tensor) -> Tensor:
        if field is critic.online:
            asked.append(points)
        return velocity_of(field, pair, points, times)

    monkeypatch.setattr(critic, "_velocity", seen)
    _, metrics = critic.loss(batch, batch.actions, levels)
    goes_on = (batch.discounts > 0).float()
    step = batch.next_observations - batch.observations
    draws = critic._draws(levels)
    way = velocity + torch.cat([step, 0 * step[:, :1]], -1)  # of points that are seen from s
    torch.testing.assert_close(asked[1][0], draws.starts + draws.times * way)
    ends = torch.cat([step, 2 * goes_on[:, None] - 1], -1)
    of_soon = (ends - draws.starts).square().mean(-1)
    of_later = way.square().mean(-1)
    expected = ((1 - discount * goes_on) * of_soon + discount * goes_on * of_later).mean()
    torch.testing.assert_close(metrics["matching"], expected)


def test_values_in_units_of_reward() -> None:
    statistics = UNIT | {"reward_centre": 10.0, "reward_scale": 30.0, "observation_mean": [3.0, 1.0]}
    critic = still(make(statistics=statistics, samples=2), torch.tensor([0.0, 0.0, 9.0]))
    critic.reward_range.widen(torch.tensor([-20.0, 40.0]))
    bias = critic.reward.layers[-1].bias
    with torch.no_grad():
        for parameter in critic.reward.parameters():
            parameter.zero_()
        bias.fill_(0.5)  # type: ignore[union-attr, operator]
    pair, z = Pair(torch.zeros(4, 2), torch.zeros(4, 1)), torch.randn(4, 2, 3)

    def values() -> Tensor:
        return critic._sampled_values(pair, critic._ahead(pair, z))

    torch.testing.assert_close(values(), torch.full((1, 4, 2), 25.0 / (1 - 0.9)))  # for ever
    critic.target.layers[-1].bias[..., -1] = -9.0  # type: ignore[union-attr, operator, index]
    torch.testing.assert_close(values(), torch.full((1, 4, 2), 25.0))  # once, with the end
    bias.data.fill_(7.0)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(values(), torch.full((1, 4, 2), 40.0))  # the most there is
    future = critic.sample(torch.full((4, 2), 5.0), torch.zeros(4, 1), torch.zeros(4, 3))
    assert torch.equal(future.observations, torch.full((4, 2), 5.0))
    assert torch.equal(future.continues, torch.zeros(4))


def test_the_target_is_the_reward_and_what_is_ahead_of_the_next_pair() -> None:
    critic, batch = make(samples=2), steps()
    critic._sampled_values = lambda pair, ahead: torch.full((1, 6, 2), 3.0)  # type: ignore[method-assign]
    _, metrics = critic.loss(batch, batch.actions, torch.rand(6, critic.levels))
    expected = batch.rewards + batch.discounts * 3.0
    torch.testing.assert_close(metrics["q_mean"], expected.mean())
    torch.testing.assert_close(metrics["q_max"], expected.max())


def test_uniform_numbers_become_normal_ones() -> None:
    critic = make(samples=3)
    levels = torch.rand(4000, critic.levels)
    levels[0] = 0.0
    levels[1] = math.nextafter(1.0, 0.0)
    draws = critic._draws(levels.float().clamp(max=1 - 2**-24))
    assert draws.there.shape == (4000, 3, 3)
    assert draws.starts.shape == (4000, 3)
    for normal in draws[1:]:
        assert normal.isfinite().all()
        assert normal.mean().abs() < 0.05
        assert abs(normal.std() - 1) < 0.05


@pytest.mark.parametrize(("aggregate", "expected"), [("mean", [2.0, 3.5]), ("min", [1.0, 2.0])])
def test_the_ensemble_is_aggregated_in_the_target(aggregate: Aggregate, expected: list[float]) -> None:
    critic = make(members=2, aggregate=aggregate)
    assert critic._aggregated(torch.tensor([[1.0, 5.0], [3.0, 2.0]])).tolist() == expected


@pytest.mark.parametrize(
    "spec,statistics,message",
    [
        (Spec(0, 1, image=(1, 64, 64, 3)), UNIT, "not images"),
        (Spec(2, 4, horizon=4), UNIT, "single steps"),
        (Spec(3, 1), UNIT | {"observation_std": [1.0, 1.0]}, "observation_std needs 3 numbers, got 2"),
    ],
)
def test_what_is_refused(spec: Spec, statistics: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(spec, statistics=statistics)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (("data.n_step=3",), "occupancy learns single steps: leave data.n_step at 1"),
        (("task.discount=0",), "task.discount above 0"),
        (("task.discount=1",), "task.discount"),
        (("agent.critic.discount=-0.1",), "agent.critic.discount must be a number of at least 0"),
        (("agent.critic.samples=0",), "agent.critic.samples"),
        (("agent.critic.objective=td3",), "td2_cfm or td_cfm_coupled or td_cfm"),
    ],
)
def test_what_does_not_fit_together(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(compose_config("experiment=pointmaze", "agent/critic=occupancy", *overrides))


def test_values_without_a_policy_have_no_future() -> None:
    config = compose_config("experiment=pointmaze", "agent=ifql", "agent/critic=occupancy", "networks.hidden=[8]")
    with pytest.raises(UserError, match="ensemble or flow"):
        build_agent(config.agent, Spec(5, 3))
