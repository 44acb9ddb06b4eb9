"""Every flow agent on cube_single: the same data, networks and number of updates.

python studies/agents.py run DATA.npz      trains every agent with its seeds, one after the other
python studies/agents.py table [LOGS]      prints the table of docs/results.md; measures speed, so let nothing else run
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from original_comparison import seeds

from deflow.bare_loop import bare_seconds
from deflow.benchmark import random_transitions
from deflow.build import build_agent
from deflow.data.datamodule import BatchStream
from deflow.evaluation.latency import latency
from deflow.evaluation.statistics import bootstrap_interval
from deflow.loggers import read_metrics
from deflow.types import Spec

ROOT = Path(__file__).parents[1]
SEEDS = {"deflow": 3, "fql": 3, "fbrac": 2, "ifql": 2, "fawac": 2, "flow_bc": 2}
# FBRAC as in the released commands of Value Flows for manipulation tasks; the others as configured.
SETTINGS = {"fbrac": ("agent.alpha=100", "agent.normalize_q=false")}
UPDATES = (15_000, 30_000, 45_000, 60_000)
EPISODES, TIMED, ROUNDS = 50, 50, 5
CUBE = Spec(observation_dim=28, action_dim=5)


def run(data: str) -> None:
    """Train every agent jointly, with the papers' settings where there are any."""
    for agent, count in SEEDS.items():
        for seed in range(count):
            command = [sys.executable, "train.py", "experiment=original_comparison", f"agent={agent}", "stages=joint"]
            command += [f"seed={seed}", f"name=table_{agent}", f"data.source.path={data}", *SETTINGS.get(agent, ())]
            subprocess.run(command, cwd=ROOT, check=True)


def table(logs: Path) -> None:
    """Print success over the seeds, updates/s and latency."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    columns = ["agent (seeds)", *(f"{n // 1000}k" for n in UPDATES), "95% at the end", "updates/s", "latency"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for agent in SEEDS:
        runs = [folder for folder in sorted((logs / f"table_{agent}").glob("*/")) if (folder / "metrics.csv").exists()]
        if not runs:
            continue
        curves = [success_of(folder) for folder in runs]
        at = {n: [curve[n] for curve in curves if n in curve] for n in UPDATES}
        cells = [seeds(values) if values else "-" for values in at.values()]
        config = yaml.safe_load((runs[0] / "config.yaml").read_text())
        speed, milliseconds = speed_of(config["agent"])
        row = [f"{agent} ({len(runs)})", *cells, interval(at[UPDATES[-1]]), f"{speed:.0f}", f"{milliseconds:.2f} ms"]
        print("| " + " | ".join(row) + " |", flush=True)


def success_of(folder: Path) -> dict[int, float]:
    """Updates -> success."""
    rows = read_metrics(folder / "metrics.csv")
    return {int(row["step"]): row["eval/success"] for row in rows if "eval/success" in row}


def speed_of(settings: dict[str, Any]) -> tuple[float, float]:
    """Updates/s in a bare loop and the median latency of one decision in ms, both on one thread."""
    agent = build_agent(settings, CUBE)
    stream = BatchStream(random_transitions(agent), 256, 0, TIMED, (0, "speed"))
    seconds = median([bare_seconds(agent, stream) for _ in range(ROUNDS + 1)][1:])
    return TIMED / seconds, latency(agent)["latency_ms_p50"]


def interval(successes: list[float]) -> str:
    """Bootstrap over all episodes of all seeds."""
    if not successes:
        return "-"
    episodes = [float(i < round(success * EPISODES)) for success in successes for i in range(EPISODES)]
    low, high = bootstrap_interval(episodes)
    return f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data]:
            run(data)
        case ["table", *logs]:
            table(Path(logs[0]) if logs else ROOT / "logs")
        case _:
            sys.exit(__doc__)
