"""What a part may have of its own in the optimizer: rate, decay, clipping, schedule; and an average of its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.policy import Policy, evaluation_mode
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.conftest import compose_config


def make(*overrides: str, agent: str = "deflow") -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", f"agent={agent}", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


def backward(agent: Agent) -> None:
    batch = random_batch(agent)
    torch.stack([loss for _, loss, _ in agent.losses(batch, agent.noise(batch, 0))]).sum().backward()


def norm(agent: Agent, part: str) -> float:
    return torch.cat([p.grad.flatten() for p in agent.parameters_of(part) if p.grad is not None]).norm().item()


def test_a_part_has_what_it_is_given_and_the_others_the_common_settings() -> None:
    agent = make("agent.optimizer.lr=1e-3", "+agent.optimizer.parts.critic={lr: 5e-5, weight_decay: 0.1}")
    groups = {
        group["name"]: (group["lr"], group["weight_decay"]) for group in agent.configure_optimizers().param_groups
    }
    assert groups == {"behavior_flow": (1e-3, 0), "critic": (5e-5, 0.1), "refiner": (1e-3, 0)}
    agent.begin_stage("test", ["critic"], first_step=0, lr=0.5)  # a stage's own goes first
    assert [group["lr"] for group in agent.configure_optimizers().param_groups] == [0.5]


def test_an_unknown_part() -> None:
    with pytest.raises(UserError, match=r"agent.optimizer.parts names \['critik'\]: choose among the agent's parts"):
        make("+agent.optimizer.parts.critik.lr=0.1")
    with pytest.raises(UserError, match=r"stage 'test' names \['critik'\]"):
        make().begin_stage("test", "all", first_step=0, cosine_decay_steps=1, decaying=["critik"])


def test_each_part_is_clipped_by_itself() -> None:
    agent = make("agent.optimizer.clip=1e-3", "+agent.optimizer.parts.refiner.clip=1e-4")
    agent.configure_optimizers()
    backward(agent)
    before = norm(agent, "critic")
    agent.on_before_optimizer_step(agent.configure_optimizers())
    assert before > 1e-2
    assert norm(agent, "critic") == pytest.approx(1e-3, rel=1e-2)
    assert norm(agent, "refiner") == pytest.approx(1e-4, rel=2e-2)


def test_a_small_gradient_is_left_alone() -> None:
    clipped, free = make("agent.optimizer.clip=1e6"), make()
    for agent in (clipped, free):
        backward(agent)
        agent.on_before_optimizer_step(agent.configure_optimizers())
    assert norm(clipped, "critic") == norm(free, "critic")


def test_the_rate_falls_of_the_parts_that_decay() -> None:
    agent = make()
    agent.begin_stage("test", "all", first_step=0, cosine_decay_steps=4, decaying=["critic"])
    settings = agent.configure_optimizers()
    optimizer, schedule = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(5):
        rates.append([group["lr"] / 3e-4 for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [rate[1] for rate in rates] == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0])
    assert {rate for rate, _, other in rates} | {other for *_, other in rates} == {1}


@pytest.mark.parametrize(
    ("agent", "part"),
    [("deflow", "behavior_flow"), ("fql", "behavior_flow"), ("idql", "behavior"), ("srpo", "behavior")],
)
def test_an_average_follows_and_acts_in_evaluation_alone(agent: str, part: str) -> None:
    made = make(f"agent.{part}.ema=0.75", agent=agent)
    average = getattr(made, part).average
    before = {name: value.clone() for name, value in average.network.state_dict().items()}
    network = next(module for name, module in getattr(made, part).named_children() if name in ("field", "net"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    made.on_before_optimizer_step(made.configure_optimizers())
    for name, value in average.network.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.25)
    assert average.of(network) is network
    with evaluation_mode(made):
        assert average.of(network) is average.network


def test_a_policy_acts_with_the_average() -> None:
    agent = make("agent.behavior_flow.ema=0.9", agent="flow_bc")
    observations, z = torch.randn(4, 5), torch.randn(4, 3)
    with torch.no_grad():
        agent.behavior_flow.average.network.mlp.layers[-1].weight.zero_()
        agent.behavior_flow.average.network.mlp.layers[-1].bias.zero_()
    assert torch.equal(Policy(agent).actions(observations, z), z.clamp(-1, 1))  # no velocity
    assert not torch.equal(agent.act(observations, z), z.clamp(-1, 1))
