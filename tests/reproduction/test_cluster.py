"""Runs as jobs of a cluster, by submitit's executor for this machine, and by a stand-in for SLURM's commands."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from deflow.errors import UserError
from deflow.reproduction.cluster import Cluster, Work
from deflow.reproduction.layout import layout
from deflow.reproduction.plan import Job, plan
from tests.conftest import compose_config
from tests.reproduction.runs import as_if_generated

pytest.importorskip("submitit")

TINY = (*("eval.episodes=1", "eval.num_envs=1", "diversity.states=0", "networks.hidden=[8]", "data.batch_size=16"),)


def jobs_of(folder: Path, data: Path, *settings: str, seeds: int = 1) -> list[Job]:
    chosen = {"rows": ["cube-single"], "agents": ["bc"], "settings": [*TINY, *settings]}
    return plan(layout("quick"), folder, data, seeds, **chosen)


def cluster(folder: Path, name: str = "local", **options: Any) -> Cluster:
    return Cluster(folder / "jobs", 2, 1, name, {"timeout_min": 60} | options, max_timeouts=0)


@pytest.mark.slow
def test_a_preempted_job_goes_on_and_one_that_fails_is_named(
    tiny_data: Callable[[str, str], Path], tmp_path: Path
) -> None:
    data = as_if_generated("cube-single-play-v0", tiny_data("cube-single", "play"), tmp_path / "data")
    (job,) = jobs_of(tmp_path, data, "updates=1000", "eval.every=1000", "validate_every=1000", "checkpoint_every=100")
    (submitted,) = cluster(tmp_path)._executor.submit_array([Work(job, 1)])
    last = job.folder / "checkpoints" / "0_joint" / "last.ckpt"
    while not last.exists():
        assert not submitted.done(), submitted.stderr()
        time.sleep(0.1)
    (running,) = psutil.Process(int(submitted.job_id)).children()
    running.send_signal(signal.SIGUSR2)  # as SLURM announces it
    assert submitted.result() is None
    assert "Requeued job" in submitted.stdout()
    assert "stopped by SIGTERM: go on by" in job.output.read_text()
    assert job.state == "done"
    *_, bad = jobs_of(tmp_path, data, "networks.hidden=[]", seeds=2)
    assert cluster(tmp_path).run_all([job, bad]) == [f"bc on cube-single, seed 1 failed, see {bad.output}"]
    assert bad.state == "missing"


@pytest.mark.parametrize("name,groups", [("local", [2, 2, 1]), ("slurm", [3, 2])])
def test_no_more_jobs_are_submitted_at_a_time_than_is_allowed(
    name: str, groups: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_cluster(tmp_path / "bin", "echo Submitted batch job 12", monkeypatch)
    monkeypatch.setattr("deflow.reproduction.cluster.LONGEST_ARRAY", 3)
    monkeypatch.setattr("deflow.reproduction.cluster._outcome", lambda job, submitted: None)
    submitted: list[int] = []

    def submit(work: list[Work]) -> list[SimpleNamespace]:
        submitted.append(len(work))
        return [SimpleNamespace(job_id=str(number)) for number in range(len(work))]

    made = cluster(tmp_path, name)
    monkeypatch.setattr(made._executor, "submit_array", submit)
    assert made.run_all(jobs_of(tmp_path, tmp_path, seeds=5)) == []
    assert submitted == groups


def test_jobs_that_slurm_does_not_take_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_cluster(tmp_path / "bin", "echo sbatch: error: Invalid account >&2; exit 1", monkeypatch)
    (said,) = cluster(tmp_path, "slurm").run_all(jobs_of(tmp_path, tmp_path, seeds=5))
    assert said.startswith("5 runs could not be submitted (")
    assert "Invalid account" in said
    assert "\n" not in said


def as_on_a_cluster(commands: Path, sbatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put commands of SLURM's in the path."""
    commands.mkdir()
    for name in ("srun", "sbatch"):
        (commands / name).write_text(f"#!/bin/sh\n{sbatch}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")


def test_what_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tmp_path / "bin"
    as_on_a_cluster(commands, f'cat "$1" > {commands}/submitted; echo Submitted batch job 12', monkeypatch)
    config = compose_config("table=quick", "engine=slurm", "engine.submit.slurm_partition=gpu", config_name="reproduce")
    assert (config.jobs, config.threads) == (64, 4)
    made = Cluster(tmp_path / "jobs", config.jobs, config.threads, "slurm", dict(config.engine.submit), 100)
    first, second = made._executor.submit_array([Work(job, 1) for job in jobs_of(tmp_path, tmp_path, seeds=2)])
    assert (first.job_id, second.job_id) == ("12_0", "12_1")
    submitted = (commands / "submitted").read_text()
    for line in (
        "--array=0-1%2",
        "--partition=gpu",
        "--time=720",
        "--gpus-per-node=1",
        "--signal=USR2@180",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in submitted


@pytest.mark.parametrize(
    "name,options,says",
    [
        ("slurm", {}, "no jobs can be submitted to slurm here: Could not detect"),
        ("moon", {}, "no jobs can be submitted to moon here"),
        ("local", {"minutes": 3}, "no jobs can be submitted to local here: .*minutes"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(name: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        cluster(tmp_path, name, **options)
