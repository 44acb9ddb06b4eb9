"""A stack of seeds: every agent becomes what it would have become alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from deflow.agents.base import Agent
from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.types import Spec, stack
from tests.agents.tester import random_batch
from tests.conftest import compose_config

SEEDS, UPDATES = 3, 4


IMAGES = "experiment=visual_cube_single networks.encoder.stacks=[2,2] networks.encoder.features=8"


def make_agents(overrides: str) -> list[Agent]:
    agents = []
    spec = Spec(2 * 8 * 8 * 3, 3, image=(2, 8, 8, 3)) if IMAGES in overrides else Spec(5, 3)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        settings = ["networks.hidden=[16,16]", f"seed={seed}", *overrides.split()]
        if spec.image is None:
            settings.append("experiment=cube_single")
        agents.append(build_agent(compose_config(*settings).agent, spec))
    return agents


def train(agent: Agent, batches: list[Any], train: Any, freeze: tuple[str, ...]) -> None:
    agent.begin_stage("test", train, first_step=0, freeze=freeze)
    optimizer = agent.configure_optimizers()
    for number, batch in enumerate(batches):
        agent.begin_update(number)
        losses = list(agent.losses(batch, agent.noise(batch, "test", number)))
        optimizer.zero_grad()
        torch.stack([loss for _, loss, _ in losses]).sum().backward()
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()


@pytest.mark.parametrize(
    "overrides",
    [
        "agent=deflow",
        "agent=deflow agent.refiner.objective=gradient_step solver=rk4",
        "agent=deflow agent.refiner.objective=demonstration agent.refiner.lagrange=false",
        "agent=deflow agent/critic=flow agent.critic.value_range=[-1,0]",
        "agent=fql",
        "agent=fql agent/critic=floq agent.critic.value_range=[-1,0]",
        "agent=fql agent/critic=occupancy",
        "agent=fql agent.horizon=2 agent.path={mean:[0.0],std:[2.0]}",
        "agent=deflow agent/dynamics=gaussian agent.dynamics.expansion=1 agent.refiner.objective=unrolled",
        "agent=ifql",
        "agent=fawac",
        "agent=flow_bc",
        "agent=cal_ql agent.samples=2 agent.target_gap=0.8",
        "agent=rlpd agent.critic.rho=0.5",
        "agent=rlpd_original",
        "agent=rebrac",
        "agent=rebrac agent.drift=false +agent.optimizer.parts.actor.clip=0.01",
        "agent=bc agent.actor.dropout=0.1",
        "agent=iql",
        "agent=iql agent.actor.extraction=ddpgbc",
        "agent=idql agent.behavior.width=8 agent.behavior.ema=0.5",
        "agent=srpo agent.behavior.width=8 agent.actor.normalise=true",
        "agent=cac agent.optimizer.clip=0.1 agent.backup_samples=2",
        "agent=deflow agent.behavior_flow.ema=0.5",
        "agent=fql agent/dynamics=flow agent.dynamics.one_step=true",
        "agent=deflow agent/dynamics=gaussian",
        f"agent=deflow {IMAGES}",
    ],
)
def test_each_seed_is_as_alone(overrides: str) -> None:
    alone, together = make_agents(overrides), make_agents(overrides)
    seeds = SeedStack(together)
    size = 16
    batches = [[random_batch(agent, size, seed=10 * i + n) for n in range(UPDATES)] for i, agent in enumerate(alone)]
    stages: list[tuple[Any, tuple[str, ...]]] = [("all", ())]
    if not alone[0].traits.trains_jointly and len(alone[0].parts) > 1:
        stages.append(("all", alone[0].parts[:1]))
    for stage in stages:  # the second stage stacks what the first left
        for agent, own in zip(alone, batches, strict=True):
            train(agent, own, *stage)
        train(seeds, [stack(column) for column in zip(*batches, strict=True)], *stage)
    for one, other in zip(alone, together, strict=True):
        for name, expected in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(*(next(agent.parameters()) for agent in together[:2]))


@pytest.mark.parametrize("overrides", ["agent=fbrac", "agent=fql solver=dopri5"])
def test_what_does_not_stack_is_refused(overrides: str) -> None:
    with pytest.raises(UserError, match="train the seeds one by one"):
        SeedStack(make_agents(overrides))


@pytest.mark.parametrize("overrides", ["agent=deflow", "agent=fql agent.horizon=2 agent.path={mean:[0.0],std:[2.0]}"])
def test_a_stack_begins_with_a_checkpoints_weights_and_moments(overrides: str) -> None:
    batches = [random_batch(make_agents(overrides)[0], 16, seed=n) for n in range(UPDATES)]
    first = make_agents(overrides.replace("2.0", "3.0"))[0]
    first.begin_stage("test", "all", first_step=0)
    optimizer = first.configure_optimizers()
    for batch in batches:
        first.update(optimizer, batch)
    checkpoint = {"state_dict": first.state_dict(), "optimizer_states": [optimizer.state_dict()]}

    alone, together = make_agents(overrides), make_agents(overrides)
    seeds = SeedStack(together)
    for agent in (*alone, seeds):
        agent.start_from(deepcopy(checkpoint))
    for agent in alone:
        train(agent, batches, "all", ())
    train(seeds, [stack([batch] * SEEDS) for batch in batches], "all", ())
    for one, other in zip(alone, together, strict=True):
        for name, expected in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_stack_keeps_what_is_in_no_part() -> None:
    path = "agent=fql agent.horizon=2 agent.path={mean:[0.0],std:[%s]}"
    saved, others = SeedStack(make_agents(path % 2.0)).state_dict(), make_agents(path % 3.0)
    SeedStack(others).load_state_dict(saved)
    assert [agent.path_std.unique().tolist() for agent in others] == [[2.0]] * SEEDS
    assert {agent.path_std.device.type for agent in SeedStack(others).to("meta").agents} == {"meta"}


def test_a_stack_saves_and_loads() -> None:
    agents, others = make_agents("agent=deflow"), make_agents("agent=deflow seed=9")
    saved = SeedStack(agents).state_dict()
    assert not any("_alike" in key or "_stacked" in key for key in saved)
    restored = SeedStack(others)
    restored.load_state_dict(saved)
    restored.configure_optimizers()
    restored.load_state_dict(saved)  # into the views
    for one, other in zip(agents, others, strict=True):
        for name, expected in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], expected)
    assert torch.equal(restored._stacked["critic.online.layers.0.weight"][1], agents[1].critic.online.layers[0].weight)
