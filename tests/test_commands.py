"""The commands themselves: one line for every error, and a kill -9 that costs nothing but time."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from deflow.checkpoints import load_checkpoint
from deflow.loggers import read_metrics
from tests.commands import ROOT, Command, run, start, tiny_overrides


@pytest.mark.parametrize(
    "script,arguments,says",
    [
        ("train.py", ["experiment=nonsense"], "unknown experiment 'nonsense': choose one of antmaze, "),
        (
            "train.py",
            ["agent=nonsense"],
            "unknown agent 'nonsense': choose one of bc, cac, cal_ql, cal_ql_original, deflow",
        ),
        (
            "train.py",
            ["solver=nonsense"],
            "unknown solver 'nonsense': choose one of dopri5, euler, heun, midpoint, rk4",
        ),
        ("train.py", ["experiment=pointmaze", "agent.trust_region=-1"], "agent.trust_region must be a number above 0"),
        (
            "train.py",
            ["experiment=pointmaze", "agent.critic=nonsense"],
            "unknown agent/critic 'nonsense': choose one of",
        ),
        (
            "train.py",
            ["experiment=pointmaze", "seed=abc"],
            "seed must be a whole number from 0 to 4294967295, got 'abc'",
        ),
        ("train.py", ["experiment=custom"], "Missing mandatory value: data.source.path"),
        ("inspect_data.py", ["task=nonsense"], "unknown task 'nonsense': choose one of antmaze-large-"),
        ("train.py", ["experiment=pointmaze", "agent.nonsense=1"], "no setting 'agent.nonsense'"),
        ("train.py", ["resume=nowhere"], "nowhere is not a run to resume"),
        ("evaluate.py", [], "Missing mandatory value: ckpt"),
        ("serve.py", ["ckpt=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        ("push.py", ["ckpt=nowhere.ckpt"], "Missing mandatory value: to"),
        ("push.py", ["ckpt=nowhere.ckpt", "to=hf://name"], "hf://name is no address of a policy: hf://USER/NAME or"),
        ("generate.py", ["dataset=nonsense", "out=/tmp"], "cannot generate 'nonsense'"),
    ],
)
def test_errors_are_one_line(script: str, arguments: list[str], says: str, tmp_path: Path) -> None:
    new_run = script == "train.py" and not arguments[0].startswith("resume")
    folder = [f"hydra.run.dir={tmp_path / 'run'}"] if new_run else []
    result = run(script, *arguments, *folder)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "DISPLAY" not in line and "warnings.warn" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not (tmp_path / "run").exists()
    assert not (ROOT / "nowhere").exists()


def imported(errors: str) -> set[str]:
    """The modules that a process imported, as PYTHONPROFILEIMPORTTIME lists them."""
    return set(re.findall(r"^import time: .*\| +(\S+)$", errors, re.MULTILINE))


def test_a_mistake_on_the_command_line_is_told_before_anything_big_is_imported() -> None:
    result = run("train.py", "experiment=nonsense", environment={"PYTHONPROFILEIMPORTTIME": "1"}, fresh=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: unknown experiment 'nonsense'")
    assert imported(result.stderr) >= {"deflow.config"}
    assert not imported(result.stderr) & {"torch", "lightning", "mlflow", "mujoco", "matplotlib"}


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        (
            "train.py",
            ["experiment=pointmaze", "agent.trust_region=-1", "hydra.run.dir={}/run"],
            "agent.trust_region must",
        ),
        ("evaluate.py", ["ckpt={}/none.ckpt"], "no checkpoint"),
        pytest.param("export.py", ["ckpt={}/none.ckpt"], "no checkpoint", marks=pytest.mark.slow),
        pytest.param("push.py", ["ckpt={}/none.ckpt", "to=hf://someone/none"], "no checkpoint", marks=pytest.mark.slow),
        pytest.param("distill.py", ["ckpt={}/none.ckpt"], "no checkpoint", marks=pytest.mark.slow),
        ("inspect_data.py", ["task=pointmaze_medium", "data.source.path={}/none.npz"], "no file"),
        ("generate.py", ["dataset=nonsense", "out={}"], "cannot generate 'nonsense'"),
        ("benchmark.py", ["measure=[nonsense]"], "unknown nonsense"),
        ("train_expert.py", ["nonsense=1"], "no setting 'nonsense'"),
    ],
)
def test_every_command_starts_by_itself(script: str, arguments: list[str], says: str, tmp_path: Path) -> None:
    arguments = [argument.format(tmp_path) for argument in arguments]
    result = run(script, *arguments, cwd=tmp_path, environment={"PYTHONPROFILEIMPORTTIME": "1"}, fresh=True)
    assert result.returncode == 2
    assert says in next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert not imported(result.stderr) & {"mlflow", "sklearn"}  # seconds, for what few commands do


def test_a_command_that_is_not_a_run_leaves_no_log_file(tmp_path: Path) -> None:
    result = run("benchmark.py", "measure=[]", "precisions=[fp32]", "out=benchmark.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


@pytest.mark.slow
def test_kill_and_resume(point_data: Path, tmp_path: Path) -> None:
    # Killed in the evaluation after 20 updates, which takes 1000 steps, or soon after it.
    settings = ["updates=40", "eval.every=20", "checkpoint_every=10", "stages=staged", "validate_every=20"]
    settings += ["eval.episodes=1", "eval.num_envs=1", "diversity.states=0"]
    whole = run("train.py", *tiny_overrides(point_data, tmp_path / "whole", *settings))
    assert whole.returncode == 0, whole.stderr

    process = start("train.py", *tiny_overrides(point_data, tmp_path / "killed", *settings))
    last = tmp_path / "killed" / "checkpoints" / "1_extraction" / "last.ckpt"
    process.wait_for(last.exists)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not last.with_name("final.ckpt").exists(), "killed too late to show anything"

    refused = run("train.py", f"resume={tmp_path / 'killed'}", "updates=5")
    assert refused.returncode == 2
    assert "resume= keeps the run's own configuration: drop updates=5" in refused.stderr
    resumed = run("train.py", f"resume={tmp_path / 'killed'}")
    assert resumed.returncode == 0, resumed.stderr
    finals = [
        load_checkpoint(tmp_path / name / "checkpoints" / "1_extraction" / "final.ckpt") for name in ("whole", "killed")
    ]
    for name, tensor in finals[0]["state_dict"].items():
        assert torch.equal(tensor, finals[1]["state_dict"][name]), name
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "killed")]
    evaluations = [[row for row in each if "eval/success" in row] for each in rows]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_generate_and_train_on_it(tmp_path: Path) -> None:
    made = run("generate.py", "dataset=pointmaze-medium-navigate-v0", "episodes=2", f"out={tmp_path}", "steps=50")
    assert made.returncode == 0, made.stderr
    trained = run("train.py", *tiny_overrides(tmp_path, tmp_path / "run"))
    assert trained.returncode == 0, trained.stderr
    assert "GENERATED here" in trained.stdout.replace("\n", " ")
    checkpoint = tmp_path / "run" / "checkpoints" / "0_joint" / "final.ckpt"
    evaluated = run("evaluate.py", f"ckpt={checkpoint}", "episodes=1")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "success" in evaluated.stdout


def test_a_worker_that_is_killed_ends_the_command(tmp_path: Path) -> None:
    settings = ("dataset=pointmaze-medium-navigate-v0", "episodes=20000", "workers=2")
    command = start("generate.py", *settings, f"out={tmp_path}")
    command.wait_for(lambda: len(workers(command)) == 2)
    workers(command)[0].kill()
    assert command.wait() == 2
    # On a busy machine the other worker may not have begun yet, and says that the queue of its work is gone.
    said = [line for line in command.output()[1].splitlines() if line.startswith("error: ")]
    assert [line.startswith("error: a process that generated pointmaze-medium") for line in said] == [True]
    assert not list(tmp_path.glob("*.npz"))
    command.wait_for_others()


def workers(command: Command) -> list[psutil.Process]:
    found = []
    for process in command.processes():
        with suppress(psutil.NoSuchProcess):  # it has ended since
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_workers_end_with_the_command(tmp_path: Path) -> None:
    settings = ("dataset=pointmaze-medium-navigate-v0", "episodes=20000", "workers=2")
    command = start("generate.py", *settings, f"out={tmp_path}")
    command.wait_for(lambda: len(workers(command)) == 2)
    command.send_signal(signal.SIGKILL)
    command.wait()
    command.wait_for_others()
