"""Running the project's commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from deflow.distillation import distill
from deflow.inspection import inspect
from deflow.pipeline import evaluate, train
from tests.conftest import CKPT, TINY, compose_config, tiny_config

ROOT = Path(__file__).parents[1]


def start(script: str, *overrides: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start a command of the project in the folder `cwd`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *overrides]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(script: str, *overrides: str, cwd: Path = ROOT, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a command of the project to its end, in the folder `cwd`."""
    process = start(script, *overrides, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def tiny_overrides(data: Path, folder: Path, *overrides: str) -> list[str]:
    """Overrides of a training command that ends in seconds and writes into `folder`."""
    return ["experiment=pointmaze", *TINY, f"paths.data={data}", f"hydra.run.dir={folder}", *overrides]


def call(name: str, run: Path, data: Path, out: Path, *more: str) -> object:
    """Call a command in this process with the files of `run`; whatever it creates elsewhere is in `out`."""
    ckpt = f"ckpt={run / CKPT}"
    if name == "evaluate":
        return evaluate(compose_config(ckpt, "episodes=1", *more, config_name="evaluate"))
    if name == "distill":
        settings = ("updates=1", "eval.episodes=1", "logger=csv", "agent.actor.hidden=[8]", "threads=1")
        settings += ("trainer.log_every_n_steps=1", *more)
        return distill(compose_config(ckpt, *settings, config_name="distill"), out)
    if name == "inspect_data":
        settings = ("task=pointmaze_medium", f"paths.data={data}", f"out={out}", "samples=2", *more)
        return inspect(compose_config(ckpt, *settings, config_name="inspect_data"))
    if name == "train ckpt":
        return train(tiny_config(data, "experiment=pointmaze", ckpt, *more), out)
    return train(compose_config(f"resume={run}", *more), run)
