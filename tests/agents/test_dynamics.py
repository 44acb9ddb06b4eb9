"""The part `dynamics`: the shared checks, that it leaves the other parts alone, and that it is off unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deflow.build import build_agent
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.checks import check
from deflow.command_line import choices
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent, random_batch
from tests.conftest import CKPT, compose_config, tiny_config

OFFER_IT = ("deflow", "fql", "ifql", "fawac", "fbrac")
CHOICES = (
    ("agent/dynamics=flow",),
    ("agent/dynamics=flow", "agent.dynamics.one_step=true"),
    ("agent/dynamics=gaussian",),
)


def make(agent: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", f"agent={agent}", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("agent", OFFER_IT)
def test_shared_checks(agent: str, choice: tuple[str, ...]) -> None:
    check_agent(make(agent, *choice))


@pytest.mark.parametrize("agent", choices("agent"))
def test_it_is_off_unless_asked_for(agent: str) -> None:
    config = compose_config("experiment=pointmaze", f"agent={agent}")
    assert "dynamics" not in config.agent


@pytest.mark.parametrize("agent", OFFER_IT)
def test_the_other_parts_do_not_notice_it(agent: str) -> None:
    without, beside = make(agent), make(agent, "agent/dynamics=flow", "agent.dynamics.one_step=true")
    batch = random_batch(without)
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, beside.state_dict()[name]), name
    losses, more = (
        {part: loss for part, loss, _ in one.losses(batch, one.noise(batch, "test"))} for one in (without, beside)
    )
    assert more.keys() - losses.keys() == {"dynamics"}
    for part, loss in losses.items():
        assert torch.equal(loss, more[part]), part


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_a_run_in_a_stage_of_its_own(kind: str, point_data: Path, tmp_path: Path) -> None:
    overrides = ("agent=fql", f"agent/dynamics={kind}", "stages.joint.train=[dynamics]")
    config = tiny_config(point_data, "experiment=pointmaze", *overrides)
    summary = train(config, tmp_path)
    assert (tmp_path / "transitions.png").exists()
    assert set(summary["dynamics"]["error"]) == {"nothing changes", "sample", "sample, mean"}
    assert set(summary["dynamics"]["error"]["sample"]) == {"1", "5", "25"}  # trajectories have 40 steps
    checkpoint = load_checkpoint(tmp_path / CKPT)
    statistics = checkpoint["deflow"]["config"]["agent"]["dynamics"]["statistics"]
    saved = agent_of(checkpoint).transition_model
    assert saved is not None
    for name, value in statistics.items():
        torch.testing.assert_close(getattr(saved, name), torch.tensor(value, dtype=torch.float32))


@pytest.mark.parametrize(
    "overrides,message",
    [
        (("data.n_step=3",), "data.n_step at 1"),
        (("task.discount=0",), "task.discount above 0"),
        (("agent.dynamics.hidden=[0]",), "agent.dynamics.hidden"),
        (("agent.dynamics.statistics=none",), "agent.dynamics.statistics"),
    ],
)
def test_what_does_not_fit_together(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(compose_config("experiment=pointmaze", "agent/dynamics=flow", *overrides))


@pytest.mark.parametrize("overrides,message", [(("agent.horizon=4",), "single steps"), ((), "not images")])
def test_what_it_does_not_model(overrides: tuple[str, ...], message: str) -> None:
    config = compose_config("experiment=pointmaze", "agent=fql", "agent/dynamics=flow", *overrides)
    spec = Spec(5, 3) if overrides else Spec(0, 3, image=(1, 64, 64, 3))
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_agent(config.agent, spec)
