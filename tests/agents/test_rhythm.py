"""Parts that train in every second update only: what is logged, stacked, compiled, distributed and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo

from deflow.agents.base import Agent
from deflow.agents.rebrac import ReBRAC
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.loggers import read_metrics
from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.commands import run as run_command
from tests.commands import tiny_overrides
from tests.conftest import compose_config, tiny_config

ACTOR = "train/actor/q"


def make(*overrides: str) -> ReBRAC:
    torch.manual_seed(0)
    return build_agent(compose_config("agent=rebrac", "networks.hidden=[16,16]", *overrides).agent, Spec(5, 3))


def gradients(agent: Agent, number: int) -> dict[str, torch.Tensor]:
    agent.begin_update(number)
    agent.zero_grad()
    batch = random_batch(agent)
    torch.stack([loss for _, loss, _ in agent.losses(batch, agent.noise(batch, number))]).sum().backward()
    return {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}


def rows_of(folder: Path) -> dict[float, dict[str, float]]:
    return {row["step"]: row for row in read_metrics(folder / "metrics.csv") if "train/critic/loss" in row}


def test_due_in_every_second_update_and_alone_in_each() -> None:
    agent = make()
    trained = [{name.partition(".")[0] for name in gradients(agent, number)} for number in range(4)]
    assert trained == [{"critic"}, {"critic", "actor"}] * 2
    agent.begin_stage("test", ["actor"], first_step=0)
    assert {name.partition(".")[0] for name in gradients(agent, 0)} == {"actor"}


def test_impossible_rhythms() -> None:
    with pytest.raises(UserError, match=r"every names \['policy'\]: choose among the agent's parts critic, actor"):
        make("+agent.every.policy=2")
    with pytest.raises(UserError, match=r"updates in which nothing trains: set agent.every.critic=1"):
        make("+agent.every.critic=3")


def test_the_log_shows_a_parts_last_values(finished_run: Callable[..., Path]) -> None:
    each = rows_of(finished_run("agent=rebrac", "trainer.log_every_n_steps=1"))
    third = rows_of(finished_run("agent=rebrac", "trainer.log_every_n_steps=3"))
    assert ACTOR not in each[1]
    assert each[3][ACTOR] == each[2][ACTOR] != each[4][ACTOR]
    assert third == {step: each[step] for step in (3, 6)}


def test_two_graphs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which graph an update gets is settled before any code is made of it, which costs half a minute.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda losses, options=None: compile_(losses, backend="aot_eager"))
    eager, compiled = make(), make()
    compiled.compile_losses()
    dynamo.utils.counters.clear()
    for number in range(8):
        torch.testing.assert_close(gradients(compiled, number), gradients(eager, number))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_resume_in_mid_rhythm(
    finished_run: Callable[..., Path], point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("agent=rebrac", "trainer.log_every_n_steps=3", "checkpoint_every=2", "validate_every=2")
    whole = finished_run(*settings)
    training_step = Agent.training_step

    def dies(agent: Agent, batch: object, batch_idx: int) -> torch.Tensor:
        if agent.global_step == 2:  # the row of the third update shows the actor of the second
            raise SystemExit("killed")
        return training_step(agent, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Agent, "training_step", dies)
        with pytest.raises(SystemExit):
            train(tiny_config(point_data, "experiment=pointmaze", *settings), tmp_path)
    train(compose_config(f"resume={tmp_path}"), tmp_path)
    assert rows_of(tmp_path) == rows_of(whole)
    states = [torch.load(folder / "checkpoints/0_joint/final.ckpt")["state_dict"] for folder in (whole, tmp_path)]
    for name, expected in states[0].items():
        assert torch.equal(states[1][name], expected), name


@pytest.mark.slow
def test_two_processes(point_data: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(point_data, tmp_path / "run", "agent=rebrac", "trainer=ddp_sim")
    result = run_command("train.py", *overrides)
    assert result.returncode == 0, result.stderr
    assert set(rows_of(tmp_path / "run")) == {2, 4, 6}
