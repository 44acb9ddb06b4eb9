"""distill.py: the student imitates, is self-contained, and a teacher that chooses is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deflow.agents.distilled import Distilled
from deflow.build import build_agent
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.config import plain
from deflow.distillation import _training_config, distill
from deflow.errors import UserError
from deflow.evaluating import evaluate
from deflow.policy import Policy
from deflow.types import Spec
from tests.agents.tester import check_agent, random_batch
from tests.conftest import CKPT, compose_config


def make(*overrides: str) -> Distilled:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "networks.hidden=[16,16]", *overrides)
    student = compose_config("ckpt=none", "agent.actor.hidden=[64,64]", config_name="distill")
    teacher = {key: value for key, value in plain(config.agent).items() if key != "horizon"} | {"_partial_": True}
    agent: Any = build_agent(plain(student.agent) | {"teacher": teacher}, Spec(5, 3))
    return agent


def test_shared_checks() -> None:
    check_agent(make())


def test_it_learns_the_teachers_map_from_noise_to_action() -> None:
    agent = make()
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    observations, z = torch.randn(64, 5, generator=generator), torch.randn(64, 3, generator=generator)
    target = Policy(agent.teacher).actions(observations, z[:, None])
    for _ in range(300):
        loss = (agent.actor(observations, z) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (agent.act(observations, z) - target).square().mean() < 0.01 * target.var()


def test_a_teacher_is_imitated_as_it_is_evaluated() -> None:
    agent = make("agent=rlpd")
    agent.train()
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
    _, loss, _ = next(agent.losses(batch, noise))
    expected = (agent.actor(batch.observations, noise.z) - agent.teacher.actor.mode(batch.observations)).square().mean()
    torch.testing.assert_close(loss, expected)


def test_a_teacher_that_chooses_is_refused() -> None:
    with pytest.raises(UserError, match=r"\+teacher.best_of_n=1"):
        make("agent.best_of_n=4")


@pytest.mark.parametrize(("trainer", "expected"), [("cpu", "highest"), ("gpu", "auto")])
def test_the_precision_of_another_device_is_not_taken_over(
    trainer: str, expected: str, finished_run: Callable[..., Path]
) -> None:
    command = compose_config(f"ckpt={finished_run() / CKPT}", f"trainer={trainer}", config_name="distill")
    assert _training_config(command).matmul_precision == expected


def test_there_must_be_a_policy_to_imitate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ckpt=PATH, or a distillation to go on with, resume=FOLDER"):
        distill(compose_config(config_name="distill"), tmp_path / "run")


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("horizon", [1, 2])
def test_a_run(horizon: int, finished_run: Callable[..., Path], tmp_path: Path) -> None:
    run = finished_run() if horizon == 1 else finished_run(f"agent.horizon={horizon}")
    taught = Path(shutil.copy(run / "checkpoints" / "0_joint" / "final.ckpt", tmp_path))
    overrides = [f"ckpt={taught}", "updates=2", "eval.episodes=2", "logger=csv", "agent.actor.hidden=[16]"]
    config = compose_config(*overrides, "trainer.log_every_n_steps=1", config_name="distill")
    result = distill(config, tmp_path / "run")
    assert result["teacher"]["episodes"] == result["one_step"]["episodes"] == 2
    assert 0 < result["one_step"]["latency_ms_p50"] <= result["one_step"]["latency_ms_p99"]
    final = tmp_path / "run" / "checkpoints" / "0_distillation" / "final.ckpt"
    weights = load_checkpoint(taught)["state_dict"]
    teacher = agent_of(load_checkpoint(final)).teacher.state_dict()  # type: ignore[union-attr, operator]
    assert all(torch.equal(teacher[name], weight) for name, weight in weights.items())
    report = tmp_path / "run" / "distillation.json"
    report.unlink()  # as if killed while the two were compared
    resumed = distill(compose_config(f"resume={tmp_path / 'run'}", config_name="distill"), tmp_path / "run")
    for name in ("teacher", "one_step"):
        assert resumed[name]["return"] == result[name]["return"]
    assert report.exists()
    taught.unlink()
    again = evaluate(compose_config(f"ckpt={final}", "episodes=2", config_name="evaluate"))
    assert again["return"] == result["one_step"]["return"]
