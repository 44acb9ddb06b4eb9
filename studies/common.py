"""What the studies share: runs that are made once, and how their successes are shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from deflow.evaluation.statistics import bootstrap_interval
from deflow.loggers import read_metrics

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "logs"
EPISODES = 50  # of an evaluation
TASKS = {"cube_single": "null", "scene": "1"}  # of the studies on two tasks: task ids


def task_settings(task: str, data: Path) -> list[str]:
    """Arguments of `train.py` for one of `TASKS`, its data set in the folder `data`."""
    path = data / f"{task.replace('_', '-')}-play-v0.npz"
    return [f"task={task}", f"task_id={TASKS[task]}", f"data.source.path={path}"]


def train_once(folder: Path, settings: Sequence[str], wait: bool = False, script: str = "train.py") -> None:
    """Train in `folder` unless that is done; go on if it was begun; leave it to another process that is at it.

    So a study that was stopped goes on where it was, and one that is started twice uses two cores.

    Args:
        folder: of the run.
        settings: arguments of `train.py`.
        wait: for the other process to finish.
        script: what trains.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=-1 if wait else 0):
            if is_done(folder):
                return
            begun = (folder / "config.yaml").exists()
            arguments = [f"resume={folder}"] if begun else [*settings, f"hydra.run.dir={folder}"]
            subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True)
    except Timeout:
        return


def is_done(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def runs(logs: Path, name: str) -> list[Path]:
    """Folders of a study's runs, those that are done, by their seeds."""
    return [folder for folder in sorted(logs.glob(f"{name}/seed_*/")) if is_done(folder)]


def success_of(folder: Path) -> dict[int, float]:
    """Updates -> success."""
    rows = read_metrics(folder / "metrics.csv")
    return {int(row["step"]): row["eval/success"] for row in rows if "eval/success" in row}


def seeds(values: Sequence[float]) -> str:
    """The mean, and each seed's."""
    return f"**{sum(values) / len(values):.2f}** ({', '.join(f'{value:.2f}' for value in values)})"


def interval(successes: Sequence[float]) -> str:
    """95% interval by bootstrap over all episodes of all seeds."""
    episodes = [float(i < round(success * EPISODES)) for success in successes for i in range(EPISODES)]
    low, high = bootstrap_interval(episodes)
    return f"{low:.2f} to {high:.2f}"
