"""Offline to online: DeFlow and FQL trained on data and then in the environment, RLPD in the environment alone.

python studies/online.py run FOLDER       trains every agent on both tasks with every seed; FOLDER holds
                                          cube-single-play-v0.npz and scene-play-v0.npz
python studies/online.py table [LOGS]     prints the tables of docs/results.md from the runs' folders
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import LOGS, TASKS, interval, runs, seeds, success_of, task_settings, train_once

STAGES = {"deflow": "offline_to_online", "fql": "offline_to_online", "rlpd_original": "from_scratch"}
SEEDS = (0, 1, 2)
OFFLINE, ONLINE, EVERY = 20_000, 10_000, 5_000  # updates; environment steps with an update each; between evaluations


def run(data: Path) -> None:
    """Train every agent on every task with every seed."""
    common = ["experiment=original_comparison", "tau=0.02", f"eval.every={EVERY}"]
    common += [f"updates={OFFLINE}", f"online_updates={ONLINE}"]
    for seed in SEEDS:
        for task in TASKS:
            for agent, stages in STAGES.items():
                settings = [*task_settings(task, data), f"agent={agent}", f"stages={stages}", f"seed={seed}"]
                train_once(LOGS / f"online_{task}_{agent}" / f"seed_{seed}", [*common, *settings])


def table(logs: Path) -> None:
    """Print success before and after the online stage, and on the way."""
    steps = range(0, ONLINE + 1, EVERY)
    columns = ["agent (seeds)", *(f"{step // 1000}k" for step in steps), "95% before", "95% after"]
    for task in TASKS:
        print(f"\n{task}, environment steps:\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for agent, stages in STAGES.items():
            offline = OFFLINE if stages == "offline_to_online" else 0
            curves = [success_of(folder) for folder in runs(logs, f"online_{task}_{agent}")]
            at = {step: [curve[offline + step] for curve in curves if offline + step in curve] for step in steps}
            cells = [seeds(successes) if successes else "-" for successes in at.values()]
            cells += [interval(at[step]) if at[step] else "-" for step in (0, ONLINE)]
            print("| " + " | ".join([f"{agent} ({len(curves)})", *cells]) + " |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data]:
            run(Path(data))
        case ["table", *logs]:
            table(Path(logs[0]) if logs else LOGS)
        case _:
            sys.exit(__doc__)
