"""Running the project's commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import TINY

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
