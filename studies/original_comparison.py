"""DeFlow's joint and staged schedules beside the authors' code, on the same data with the same networks.

python studies/original_comparison.py run DATA.npz    trains 2 schedules x 3 seeds, one after the other
python studies/original_comparison.py table           prints the table of docs/results.md from the runs' folders
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import yaml

from deflow.loggers import read_metrics

ROOT = Path(__file__).parents[1]
SCHEDULES = ("joint", "staged")
SEEDS = (0, 1, 2)
EPISODES = 50

# Success of the authors' released DeFlow, unchanged, on the same file: updates -> one number a seed (50 episodes each).
ORIGINAL = {15_000: (0.46, 0.38), 30_000: (0.76, 0.58), 45_000: (0.88, 0.80), 60_000: (0.90,)}


def run(data: str) -> None:
    """Train every schedule with every seed; `staged` with fewer behaviour updates than policy updates."""
    for schedule in SCHEDULES:
        for seed in SEEDS:
            command = [sys.executable, "train.py", "experiment=original_comparison", f"stages={schedule}"]
            command += [f"seed={seed}", f"name=study_{schedule}", f"data.source.path={data}"]
            command += ["stages.behavior.steps=45000"] if schedule == "staged" else []
            subprocess.run(command, cwd=ROOT, check=True)


def table(logs: Path) -> None:
    """Print success by policy updates, and the difference from the original in standard errors."""
    print("| policy updates | original (seeds) | " + " | ".join(f"{s} (seeds) | difference" for s in SCHEDULES) + " |")
    print("|---|---|" + "---|---|" * len(SCHEDULES))
    results = {schedule: successes(logs / f"study_{schedule}") for schedule in SCHEDULES}
    for updates, original in ORIGINAL.items():
        cells = [f"{updates // 1000}k", seeds(original)]
        for schedule in SCHEDULES:
            ours = [curve[updates] for curve in results[schedule].values() if updates in curve]
            cells += [seeds(ours), difference(ours, original)] if ours else ["-", "-"]
        print("| " + " | ".join(cells) + " |")


def successes(folder: Path) -> dict[int, dict[int, float]]:
    """Seed -> policy updates -> success; behaviour updates of a staged run are not counted."""
    curves: dict[int, dict[int, float]] = {}
    for run_folder in sorted(folder.glob("*/")):
        config = yaml.safe_load((run_folder / "config.yaml").read_text())
        before = config["stages"].get("behavior", {}).get("steps", 0)
        rows = read_metrics(run_folder / "metrics.csv")
        curves[config["seed"]] = {
            int(row["step"]) - before: row["eval/success"] for row in rows if "eval/success" in row
        }
    return curves


def seeds(values: tuple[float, ...] | list[float]) -> str:
    return f"**{sum(values) / len(values):.2f}** ({', '.join(f'{value:.2f}' for value in values)})"


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
            table(Path(logs[0]) if logs else ROOT / "logs")
        case _:
            sys.exit(__doc__)
