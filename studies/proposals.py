"""How many cached proposals a state needs, and how long the flow must be trained before it is frozen.

python studies/proposals.py run FOLDER [SEEDS]   trains a flow for each length, a policy for each number of proposals;
                                                 FOLDER holds cube-single-play-v0.npz and scene-play-v0.npz
python studies/proposals.py table [LOGS]         prints the tables of docs/results.md from the runs' folders
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import LOGS, TASKS, interval, runs, seeds, success_of, task_settings, train_once

BEHAVIOR = (15_000, 45_000)  # updates of the flow
PROPOSALS = ("8", "16", "32", "64", "null")  # cached for each state; null solves the ODE at every update
UPDATES, EVERY = 15_000, 7_500  # of the policy; between evaluations


def run(data: Path, count: int) -> None:
    """Train everything; the flow of one task, length and seed serves every number of proposals."""
    for seed in range(count):
        for task in TASKS:
            common = ["experiment=original_comparison", "stages=staged", *task_settings(task, data), f"seed={seed}"]
            for length in BEHAVIOR:
                flow = LOGS / f"proposals_{task}_{length}_flow" / f"seed_{seed}"
                train_once(flow, [*common, f"stages.behavior.steps={length}", "~stages.extraction"], wait=True)
                policy = [*common, "~stages.behavior", f"ckpt={flow / 'checkpoints' / '0_behavior' / 'final.ckpt'}"]
                policy += [f"updates={UPDATES}", f"eval.every={EVERY}"]
                for proposals in PROPOSALS:
                    folder = LOGS / f"proposals_{task}_{length}_{proposals}" / f"seed_{seed}"
                    train_once(folder, [*policy, f"stages.extraction.proposals={proposals}"])


def table(logs: Path) -> None:
    """Print success after all of the policy's updates."""
    names = [number.replace("null", "solved") for number in PROPOSALS]
    for task in TASKS:
        print(f"\n{task}\n\n| behaviour updates | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
        for length in BEHAVIOR:
            cells = [_cell(runs(logs, f"proposals_{task}_{length}_{number}")) for number in PROPOSALS]
            print(f"| {length // 1000}k | " + " | ".join(cells) + " |")


def _cell(folders: list[Path]) -> str:
    successes = [success_of(folder)[UPDATES] for folder in folders]
    return f"{seeds(successes)}, {interval(successes)}" if successes else "-"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data, *count]:
            run(Path(data), int(count[0]) if count else 2)
        case ["table", *logs]:
            table(Path(logs[0]) if logs else LOGS)
        case _:
            sys.exit(__doc__)
