"""The flow baselines: the shared checks, a run of each schedule, and what is particular to each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.evaluating import evaluate
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent, loss_of, random_batch, squared_targets
from tests.conftest import compose_config, tiny_config

BASELINES = ["flow_bc", "ifql", "fawac", "fbrac"]


def make(agent: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", f"agent={agent}", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


@pytest.mark.parametrize("agent", BASELINES)
def test_shared_checks(agent: str) -> None:
    check_agent(make(agent))


@pytest.mark.parametrize(
    "override",
    [
        "fbrac agent.gradient=adjoint",
        "fbrac agent.horizon=2",
        "fbrac agent/critic=occupancy",
        "fawac agent/critic=occupancy",
        "ifql agent/critic=flow",
        "ifql agent/critic=floq",
    ],
)
def test_shared_checks_of_choices(override: str) -> None:
    check_agent(make(*override.split()))


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("agent", BASELINES)
def test_a_run(agent: str, point_data: Path, tmp_path: Path) -> None:
    summary = train(tiny_config(point_data, "experiment=pointmaze", f"agent={agent}"), tmp_path)
    assert summary["evaluations"] == 2
    assert summary["agent"].lower() == agent.replace("_", "")
    ckpt = tmp_path / "checkpoints" / "0_joint" / "final.ckpt"
    result = evaluate(compose_config(f"ckpt={ckpt}", "episodes=1", config_name="evaluate"))
    assert ("best_of_n" in result) == (agent == "ifql")


def test_ifql_takes_the_sample_with_the_highest_smaller_value() -> None:
    agent = make("ifql")
    observations, z = torch.randn(4, 5), torch.randn(4, 32, 3)
    samples = torch.stack([agent.behavior_flow.propose(observations, z[:, i]) for i in range(32)], dim=1)
    values = torch.stack([agent.critic.values(observations, samples[:, i]).amin(0) for i in range(32)], dim=1)
    torch.testing.assert_close(agent.act(observations, z), samples[torch.arange(4), values.argmax(1)])


def test_ifqls_value_is_an_expectile() -> None:
    # Of a coin's two sides, -1 and 1, the 0.9 expectile v solves 0.9 * (1 - v) = 0.1 * (v + 1): v = 0.8.
    agent = make("ifql")
    observations = torch.zeros(200, 5)
    sides = torch.tensor([-1.0, 1.0]).repeat(100).expand(2, 200)
    optimizer = torch.optim.Adam(agent.value.parameters(), lr=1e-2)
    for _ in range(500):
        optimizer.zero_grad()
        agent.value.loss(observations, sides)[0].backward()
        optimizer.step()
    assert agent.value(observations).mean().item() == pytest.approx(0.8, abs=0.01)


def test_fawac_weighs_by_the_advantage() -> None:
    agent = make("fawac")
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    with torch.no_grad():
        q = agent.critic.values(batch.observations, batch.actions).mean(0)
        expected = (agent.alpha * (q - agent.value(batch.observations))).exp().clamp(max=100.0).mean()
    metrics = {part: metric for part, _, metric in agent.losses(batch, noise)}
    torch.testing.assert_close(metrics["behavior_flow"]["weight"], expected)


@pytest.mark.parametrize("agent", ["fawac", "fbrac", "ifql"])
def test_the_target_is_of_the_next_state_and_the_policys_action_there(agent: str) -> None:
    made = make(agent)
    batch = random_batch(made)
    noise = made.draw_noise(batch, torch.Generator().manual_seed(0))
    made.behavior_flow.propose = lambda s, z: z
    made.critic.target_values = lambda s, a: (s[:, 0] + a[:, 0]).expand(2, -1)
    expected = batch.next_observations[:, 0]
    if agent == "ifql":
        made.value.forward = lambda s: s[:, 0]
    else:
        expected = expected + noise.z_next[:, 0]
    targets = batch.rewards + batch.discounts * expected
    summed = 2 if agent == "ifql" else 1  # over the members, whose losses are the same here
    torch.testing.assert_close(squared_targets(made, batch, noise), summed * targets.square().mean())


@pytest.mark.parametrize(("normalize_q", "value_loss"), [("true", -1.0), ("false", -2.0)])
def test_fbracs_policy_climbs_the_value(normalize_q: str, value_loss: float) -> None:
    agent = make("fbrac", f"agent.normalize_q={normalize_q}")
    batch = random_batch(agent)
    agent.critic.frozen_values = lambda s, a: torch.tensor([[1.0], [3.0]]).expand(2, len(a))
    _, loss, metrics = loss_of(agent, "behavior_flow", batch, agent.noise(batch))
    torch.testing.assert_close(loss.detach(), agent.alpha * metrics["matching"] + value_loss)


def flow_gradient(agent: Agent, gradient: str) -> torch.Tensor:
    """Gradient of the value of the flow's actions with respect to the flow's weights, as one vector."""
    flow: Any = agent.behavior_flow
    observations, z = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double(), torch.ones(8, 3).double()
    actions = flow.sample(observations, z, gradient)
    flow.zero_grad()
    actions.square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])


def test_the_gradient_through_the_solver_equals_finite_differences() -> None:
    agent = make("fbrac").double()
    analytic = flow_gradient(agent, "backprop")
    flow: Any = agent.behavior_flow
    observations, z = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double(), torch.ones(8, 3).double()
    parameter = flow.field.mlp.layers[0].weight
    for index in ((0, 0), (3, 6), (7, 8)):
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter[index] += step
                values.append(flow.sample(observations, z).square().sum().item())
        with torch.no_grad():
            parameter[index] += 1e-6
        number = index[0] * parameter.shape[1] + index[1]
        assert analytic[number].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_the_adjoint_method_agrees_up_to_the_solvers_error(solver: str) -> None:
    # The adjoint solves another ODE, backward on the same grid: its error falls with the solver's order.
    errors = []
    for steps in (10, 20):
        agent = make("fbrac", f"solver={solver}", f"solver.steps={steps}").double()
        exact, adjoint = (flow_gradient(agent, gradient) for gradient in ("backprop", "adjoint"))
        errors.append(((adjoint - exact).norm() / exact.norm()).item())
    assert errors[1] < (0.6 if solver == "euler" else 0.1) * errors[0]
    assert errors[1] < (0.1 if solver == "euler" else 1e-6)


def test_a_policy_that_needs_its_critic_is_not_trained_without(point_data: Path, tmp_path: Path) -> None:
    config = tiny_config(point_data, "experiment=pointmaze", "agent=fbrac", "stages=staged")
    with pytest.raises(UserError, match="FBRAC trains its policy and its critic together: use stages=joint"):
        train(config, tmp_path / "run")
