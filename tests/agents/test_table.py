"""The Gaussian, diffusion and consistency baselines of the papers' tables: the shared checks and a run of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deflow.build import build_agent
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent
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
