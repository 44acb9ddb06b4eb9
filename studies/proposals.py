"""What a staged run's shortcuts cost: few cached proposals, a short behaviour stage, bfloat16.

python studies/proposals.py run FOLDER [SEEDS]   trains the flows, and a policy on each variant; FOLDER holds
                                                 cube-single-play-v0.npz and scene-play-v0.npz
python studies/proposals.py table [LOGS]         prints the tables of docs/results.md from the runs' folders

On a CPU without bfloat16 products these are computed by `float32_products.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from common import LOGS, TASKS, interval, runs, seeds, success_of, task_settings, train_once

from deflow.timing import bfloat16_gain

UPDATES, EVERY = 15_000, 7_500  # of the policy; between evaluations


class Variant(NamedTuple):
    """One way to train; each differs from the first in one thing."""

    proposals: int | None = 16  # cached for each state; None solves the ODE at every update
    behavior: int = 45_000  # updates of the flow
    precision: str = "32-true"

    @property
    def script(self) -> str:
        """What trains it here."""
        usual = self.precision == "32-true" or bfloat16_gain() > 1
        return "train.py" if usual else "studies/float32_products.py"

    def __str__(self) -> str:
        proposals = "solved" if self.proposals is None else f"{self.proposals} cached"
        return f"{proposals}, {self.behavior // 1000}k behaviour updates, {self.precision}"


FIRST = Variant()
VARIANTS = (
    FIRST,
    Variant(precision="bf16-mixed"),
    *(Variant(behavior=behavior) for behavior in (5_000, 15_000)),
    *(Variant(proposals=proposals) for proposals in (None, 8, 32, 64)),
)


def run(data: Path, count: int) -> None:
    """Train everything; the variants of one flow share it."""
    for seed in range(count):
        for task in TASKS:
            for variant in VARIANTS:
                common = ["experiment=original_comparison", "stages=staged", *task_settings(task, data)]
                common += [f"seed={seed}", f"trainer.precision={variant.precision}"]
                flow = LOGS / f"flow_{task}_{variant.behavior}_{variant.precision}" / f"seed_{seed}"
                alone = ["~stages.extraction", f"stages.behavior.steps={variant.behavior}"]
                train_once(flow, [*common, *alone], wait=True, script=variant.script)
                policy = [*common, "~stages.behavior", f"ckpt={flow / 'checkpoints' / '0_behavior' / 'final.ckpt'}"]
                policy += [f"updates={UPDATES}", f"eval.every={EVERY}"]
                policy += [f"stages.extraction.proposals={variant.proposals or 'null'}"]
                train_once(LOGS / folder_name(task, variant) / f"seed_{seed}", policy, script=variant.script)


def folder_name(task: str, variant: Variant) -> str:
    return f"staged_{task}_{variant.behavior}_{variant.proposals}_{variant.precision}"


def table(logs: Path) -> None:
    """Print success on the way and after all of the policy's updates."""
    for task in TASKS:
        print(f"\n{task}\n\n| variant | {EVERY / 1000:g}k | {UPDATES / 1000:g}k | 95% |\n|---|---|---|---|")
        for variant in VARIANTS:
            curves = [success_of(folder) for folder in runs(logs, folder_name(task, variant))]
            at = {updates: [curve[updates] for curve in curves] for updates in (EVERY, UPDATES)}
            if curves:
                print(f"| {variant} | {seeds(at[EVERY])} | {seeds(at[UPDATES])} | {interval(at[UPDATES])} |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data, *count]:
            run(Path(data), int(count[0]) if count else 2)
        case ["table", *logs]:
            table(Path(logs[0]) if logs else LOGS)
        case _:
            sys.exit(__doc__)
