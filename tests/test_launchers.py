"""Sweeps by Hydra's launchers: the jobs are runs like any other, side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deflow.run_folder import read_summary
from tests.commands import ROOT, TINY


@pytest.mark.slow
@pytest.mark.parametrize("launcher,plugin", [("joblib", "joblib"), ("submitit_local", "submitit")])
def test_a_job_that_fails_leaves_the_others_alone(
    launcher: str, plugin: str, tiny_data: Callable[[str, str], Path], tmp_path: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    settings = ["experiment=pointmaze", "agent=bc", "logger=csv", f"paths.logs={tmp_path}", "threads=1", *TINY]
    settings += [f"paths.data={tiny_data('pointmaze-medium', 'navigate')}", "data.batch_size=16,100000"]
    command = [sys.executable, "train.py", "-m", f"hydra/launcher={launcher}", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert "is larger than the data" in done.stderr
    (summary,) = tmp_path.rglob("summary.json")
    assert read_summary(summary) is not None
