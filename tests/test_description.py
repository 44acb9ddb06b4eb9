"""What a tracker is told of a run: a name to read, tags to find it by, and no setting that nobody varies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deflow.description import Description, commit, describe
from tests.conftest import compose_config

TASK = "cube-single-play-singletask-v0"


def described(*overrides: str, task: str = TASK) -> Description:
    return describe(compose_config(*overrides), task, {"name": "cube-single-play-v0", "generated": True}, Path("run"))


@pytest.mark.parametrize(
    ("overrides", "task", "name"),
    [
        (("experiment=cube_single",), TASK, "deflow seed 0 cube-single-play"),
        (("agent=cal_ql", "seed=3", "seeds=2"), TASK, "cal_ql seeds 3 to 4 cube-single-play"),
        ((), "cube-single-play-singletask-task3-v0", "deflow seed 0 cube-single-play-task3"),
        ((), "pen-human-v1", "deflow seed 0 pen-human-v1"),
        (("agent._target_=mylab.agents.Mine",), TASK, "Mine seed 0 cube-single-play"),
    ],
)
def test_the_name_says_agent_seed_and_task(overrides: tuple[str, ...], task: str, name: str) -> None:
    assert described(*overrides, task=task).name == name


def test_the_tags_say_where_a_run_comes_from() -> None:
    tags = described("stages=staged").tags
    expected = {"agent": "deflow", "task": TASK, "dataset": "cube-single-play-v0", "generated": "true"}
    assert tags.items() >= expected.items()
    assert tags["stages"] == "behavior, extraction"
    assert tags["folder"] == str(Path("run").absolute())
    assert tags["version"]


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("seed=3", "seed", 3),
        ("agent.trust_region=0.5", "agent.trust_region", 0.5),
        ("agent.critic.aggregate=min", "agent.critic.aggregate", "min"),
        ("networks.hidden=[16,16]", "networks.hidden", [16, 16]),
        ("data.n_step=5", "data.n_step", 5),
        ("solver=heun", "solver.method", "heun"),
        ("stages.joint.lr=1e-3", "stages.joint.lr", 1e-3),
        ("trainer.precision=bf16-mixed", "trainer.precision", "bf16-mixed"),
    ],
)
def test_what_a_person_varies_is_there(override: str, name: str, value: Any) -> None:
    override = f"+{override}" if name == "stages.joint.lr" else override
    assert described("experiment=cube_single", override).settings[name] == value


def test_what_nobody_varies_is_not() -> None:
    settings = described("experiment=cube_single").settings
    assert not [name for name in settings if "_target_" in name or "_partial_" in name]
    assert not settings.keys() & {"agent.critic.hidden", "agent.seed"}  # which follow networks.hidden and seed
    assert not settings.keys() & {"eval.episodes", "video.episodes", "paths.logs", "trainer.max_epochs"}
    assert len(settings) < 40


def test_the_code_is_that_of_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    first = commit()
    monkeypatch.setattr("subprocess.run", None)  # another one may lie there by the end
    assert commit() == first
