"""DeFlow's joint and staged schedules beside the authors' code, on the same data with the same networks.

python studies/original_comparison.py run DATA.npz    trains 2 schedules x 3 seeds
python studies/original_comparison.py table           prints the table of docs/results.md from the runs' folders
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from common import EPISODES, LOGS, runs, seeds, success_of, train_once

SCHEDULES = {"joint": 0, "staged": 45_000}  # behaviour updates before the policy's
SEEDS = (0, 1, 2)

# Success of the authors' released DeFlow, unchanged, on the same file: updates -> one number a seed (50 episodes each).
ORIGINAL = {15_000: (0.46, 0.38), 30_000: (0.76, 0.58), 45_000: (0.88, 0.80), 60_000: (0.90,)}


def run(data: str) -> None:
    """Train every schedule with every seed; `staged` with fewer behaviour updates than policy updates."""
    for schedule, behavior in SCHEDULES.items():
        for seed in SEEDS:
            settings = ["experiment=original_comparison", f"stages={schedule}", f"data.source.path={data}"]
            settings += [f"stages.behavior.steps={behavior}"] if behavior else []
            train_once(LOGS / f"study_{schedule}" / f"seed_{seed}", [*settings, f"seed={seed}"])


def table(logs: Path) -> None:
    """Print success by policy updates, and the difference from the original in standard errors."""
    print("| policy updates | original (seeds) | " + " | ".join(f"{s} (seeds) | difference" for s in SCHEDULES) + " |")
    print("|---|---|" + "---|---|" * len(SCHEDULES))
    results = {schedule: [success_of(run) for run in runs(logs, f"study_{schedule}")] for schedule in SCHEDULES}
    for updates, original in ORIGINAL.items():
        cells = [f"{updates // 1000}k", seeds(original)]
        for schedule, behavior in SCHEDULES.items():
            ours = [curve[behavior + updates] for curve in results[schedule]]
            cells += [seeds(ours), difference(ours, original)] if ours else ["-", "-"]
        print("| " + " | ".join(cells) + " |")


def difference(ours: list[float], original: tuple[float, ...]) -> str:
    """Difference of the means and its size in standard errors of two binomial proportions."""
    means = [sum(values) / len(values) for values in (ours, original)]
    counts = [len(values) * EPISODES for values in (ours, original)]
    error = math.sqrt(sum(mean * (1 - mean) / count for mean, count in zip(means, counts, strict=True)))
    return f"{means[0] - means[1]:+.2f} ({(means[0] - means[1]) / error:+.1f} s.e.)"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data]:
            run(data)
        case ["table", *logs]:
            table(Path(logs[0]) if logs else LOGS)
        case _:
            sys.exit(__doc__)
