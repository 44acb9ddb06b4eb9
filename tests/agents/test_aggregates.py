"""Which agents let the critic say what is taken of its ensemble."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deflow.agents.actor_critic import ActorCritic
from deflow.build import build_agent
from deflow.command_line import choices
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.conftest import compose_config


def made(name: str, aggregate: str) -> Any:
    torch.manual_seed(0)
    members = ["agent.critic.members=2"] if name == "rlpd_original" else []
    overrides = [
        "experiment=cube_single",
        f"agent={name}",
        "networks.hidden=[8]",
        f"agent.critic.aggregate={aggregate}",
    ]
    return build_agent(compose_config(*overrides, *members).agent, Spec(5, 3))


@pytest.mark.parametrize("name", sorted({*choices("agent")} - {"bc", "flow_bc"}))
def test_an_agent_says_whether_it_asks_the_critic(name: str) -> None:
    found = []
    for aggregate in ("mean", "min"):
        agent = made(name, aggregate)
        assert isinstance(agent, ActorCritic)
        batch = random_batch(agent)
        found.append(torch.stack([loss for _, loss, _ in agent.losses(batch, agent.noise(batch, "test"))]))
    assert torch.equal(*found) is agent.traits.takes_lowest
