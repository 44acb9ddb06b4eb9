"""Every critic's frozen values have a gradient into states and actions, as imagined steps need it, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deflow.build import build_agent
from deflow.types import Spec
from tests.conftest import compose_config


@pytest.mark.parametrize("critic", ["ensemble", "flow", "floq", "occupancy"])
def test_where_the_gradient_goes(critic: str) -> None:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "agent=fql", "networks.hidden=[8]", f"agent/critic={critic}")
    of_agent: Any = build_agent(config.agent, Spec(5, 3)).critic  # type: ignore[union-attr]
    observations, actions = torch.randn(4, 5, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    of_agent.frozen_values(observations, actions).sum().backward()
    for argument in (observations, actions):
        assert argument.grad is not None
        assert argument.grad.any(dim=1).all()
    assert all(parameter.grad is None for parameter in of_agent.parameters())
