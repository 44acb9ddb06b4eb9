"""Runs that were never made: the files that a table is read from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deflow.data.generate.runner import generated_path
from deflow.reproduction.layout import layout
from deflow.reproduction.plan import Job

EPISODES = 50


def as_if_generated(name: str, made: Path, folder: Path) -> Path:
    """`folder`, in which the tiny data of that name in `made` stand for those that `quick` would generate."""
    generate = layout("quick").generate
    assert generate is not None
    path = generated_path(folder, name, generate["episodes"], generate["seed"])
    path.parent.mkdir(parents=True)
    for file in (path, path.with_name(f"{name}-val.npz")):
        file.symlink_to(made / file.name)
    return folder


def write_run(job: Job, successes: Sequence[float], **changed: Any) -> None:
    """A finished run with these evaluations; `changed` goes into its summary."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").touch()
    job.made_by.write_text("\n".join(job.settings))
    rows = [f"{1000 * (number + 1)},{value}" for number, value in enumerate(successes)]
    (job.folder / "metrics.csv").write_text("step,eval/success\n" + "\n".join(rows) + "\n")
    last = successes[-3:]
    summary = {
        "task": job.row,
        "agent": job.agent,
        "seed": job.seed,
        "seeds": 1,
        "horizon": 1,
        "n_step": 1,
        "eval/success": {
            "last": successes[-1],
            "mean_of_last_three": sum(last) / len(last),
            "last_of_stage": {"joint": successes[0], "online": successes[-1]},
        },
        "eval_episodes": EPISODES,
        "updates_per_second": {"joint": 10.0},
        "seconds": 60.0,
        "data": {"name": f"{job.row}-data-v0", "generated": False},
        "protocol": "OGBench single-task",
        "success_timing": "pre",
        "transitions": {"train": 1_000_000},
        "stages": {"joint": 1_000_000},
        "commit": "abc",
        "versions": {"deflow": "0.1.0"},
    }
    (job.folder / "summary.json").write_text(json.dumps(summary | changed))
