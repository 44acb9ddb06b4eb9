"""Compiled losses are the losses."""

from __future__ import annotations

import pytest
import torch
from torch import _dynamo as dynamo

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.checks import check
from deflow.errors import UserError
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.conftest import compose_config


def values_and_gradients(agent: Agent) -> list[torch.Tensor]:
    agent.zero_grad()
    batch = random_batch(agent)
    losses = list(agent.losses(batch, agent.noise(batch, "test")))
    torch.stack([loss for _, loss, _ in losses]).sum().backward()
    metrics = [value for _, _, metrics in losses for value in metrics.values()]
    gradients = [parameter.grad.clone() for parameter in agent.parameters() if parameter.grad is not None]
    return [loss.detach() for _, loss, _ in losses] + metrics + gradients


def test_compiled_losses_and_gradients_are_the_same() -> None:
    # Stages train different parts: the second is compiled anew, not run by the first one's code.
    torch.manual_seed(0)
    config = compose_config("agent=deflow", "networks.hidden=[16]", "solver.steps=2")
    agent = build_agent(config.agent, Spec(5, 3))
    for train in (["behavior_flow"], ["critic", "refiner"]):
        agent.begin_stage("test", train, first_step=0)
        eager = values_and_gradients(agent)
        agent.compile_losses()
        torch.testing.assert_close(values_and_gradients(agent), eager)


def test_each_agent_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch lets a function have 8, and runs it eagerly from then on: a sweep in one process has more agents.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda losses, options=None: compile_(losses, backend="eager"))
    dynamo.utils.counters.clear()
    for _ in range(10):
        agent = build_agent(compose_config("agent=flow_bc", "networks.hidden=[4]").agent, Spec(5, 3))
        agent.compile_losses()
        values_and_gradients(agent)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 10


@pytest.mark.slow  # a compilation each
@pytest.mark.parametrize(
    "overrides",
    [
        "agent=fql agent/critic=occupancy",
        "agent=fql agent.horizon=2 agent.path={mean:[0.0],std:[2.0]}",
        "agent=fql agent/dynamics=flow agent.dynamics.one_step=true agent.actor.objective=unrolled",
        "agent=deflow agent/dynamics=gaussian agent.dynamics.expansion=1 agent.refiner.objective=unrolled",
    ],
)
def test_so_are_those_beside_a_model(overrides: str) -> None:
    torch.manual_seed(0)
    agent = build_agent(
        compose_config("experiment=cube_single", "networks.hidden=[16]", "solver.steps=2", *overrides.split()).agent,
        Spec(5, 3),
    )
    agent.begin_stage("test", "all", first_step=0)
    eager = values_and_gradients(agent)
    agent.compile_losses()
    torch.testing.assert_close(values_and_gradients(agent), eager, rtol=1e-4, atol=1e-5)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        check(compose_config("compile=true"))
