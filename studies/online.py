"""Offline to online: DeFlow and FQL trained on data and then in the environment, RLPD in the environment alone.

python studies/online.py run FOLDER       trains every agent on both tasks with every seed, one after the other;
                                          FOLDER holds cube-single-play-v0.npz and scene-play-v0.npz
python studies/online.py table [LOGS]     prints the tables of docs/results.md from the runs' folders
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from original_comparison import seeds

from agents import interval, success_of

ROOT = Path(__file__).parents[1]
TASKS = {"cube_single": None, "scene": 1}  # task ids
STAGES = {"deflow": "offline_to_online", "fql": "offline_to_online", "rlpd": "from_scratch"}
SEEDS = (0, 1, 2)
OFFLINE, ONLINE, EVERY = 20_000, 10_000, 5_000  # updates; environment steps with an update each; between evaluations


def run(data: Path) -> None:
    """Train every agent on every task with every seed."""
    for task, task_id in TASKS.items():
        path = data / f"{task.replace('_', '-')}-play-v0.npz"
        for seed in SEEDS:
            for agent, stages in STAGES.items():
                command = [sys.executable, "train.py", "experiment=original_comparison", f"task={task}"]
                command += [
                    f"agent={agent}",
                    f"stages={stages}",
                    f"updates={OFFLINE}",
                    f"online_updates={ONLINE}",
                    f"eval.every={EVERY}",
                ]
                command += ["tau=0.02", f"seed={seed}", f"name=online_{task}_{agent}", f"data.source.path={path}"]
                command += [] if task_id is None else [f"task_id={task_id}"]
                subprocess.run(command, cwd=ROOT, check=True)


def table(logs: Path) -> None:
    """Print success before and after the online stage, and on the way."""
    for task in TASKS:
        steps = range(0, ONLINE + 1, EVERY)
        columns = ["agent (seeds)", *(f"{step // 1000}k" for step in steps), "95% before", "95% after"]
        print(f"\n{task}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for agent in STAGES:
            curves = [online_curve(folder) for folder in sorted((logs / f"online_{task}_{agent}").glob("*/"))]
            curves = [curve for curve in curves if ONLINE in curve]
            if not curves:
                continue
            at = {step: [curve[step] for curve in curves if step in curve] for step in steps}
            cells = [seeds(values) if values else "-" for values in at.values()]
            row = [f"{agent} ({len(curves)})", *cells, interval(at[0]), interval(at[ONLINE])]
            print("| " + " | ".join(row) + " |")


def online_curve(folder: Path) -> dict[int, float]:
    """Steps in the environment -> success; 0 is the end of the offline stage."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    offline = config["stages"]["joint"]["steps"] if "joint" in config["stages"] else 0
    return {step - offline: success for step, success in success_of(folder).items()}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data]:
            run(Path(data))
        case ["table", *logs]:
            table(Path(logs[0]) if logs else ROOT / "logs")
        case _:
            sys.exit(__doc__)
