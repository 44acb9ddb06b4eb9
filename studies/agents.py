"""Every flow agent on cube_single: the same data, networks and number of updates.

python studies/agents.py run DATA.npz      trains every agent with its seeds
python studies/agents.py table [LOGS]      prints the table of docs/results.md; measures speed, so let nothing else run
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from common import LOGS, interval, runs, seeds, success_of, train_once

from deflow.benchmark import SPAN, random_transitions
from deflow.build import build_agent
from deflow.data.datamodule import BatchStream
from deflow.evaluation.latency import latency
from deflow.policy import Policy
from deflow.timing import seconds_of_updates
from deflow.types import Spec

SEEDS = {"deflow": 3, "fql": 3, "fbrac": 2, "ifql": 2, "fawac": 2, "flow_bc": 2}
# FBRAC as in the released commands of Value Flows for manipulation tasks; the others as configured.
SETTINGS = {"fbrac": ("agent.alpha=100", "agent.normalize_q=false")}
UPDATES = (15_000, 30_000, 45_000, 60_000)
TIMED, ROUNDS = 50, 5  # updates of a round
CUBE = Spec(observation_dim=28, action_dim=5)


def run(data: str) -> None:
    """Train every agent jointly, with the papers' settings where there are any."""
    for agent, count in SEEDS.items():
        for seed in range(count):
            settings = ["experiment=original_comparison", "stages=joint", f"data.source.path={data}"]
            settings += [f"agent={agent}", f"seed={seed}", *SETTINGS.get(agent, ())]
            train_once(LOGS / f"table_{agent}" / f"seed_{seed}", settings)


def table(logs: Path) -> None:
    """Print success over the seeds, updates/s and latency."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    columns = ["agent (seeds)", *(f"{n // 1000}k" for n in UPDATES), "95% at the end", "updates/s", "latency"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for agent in SEEDS:
        done = runs(logs, f"table_{agent}")
        if not done:
            continue
        curves = [success_of(folder) for folder in done]
        at = {n: [curve[n] for curve in curves] for n in UPDATES}
        speed, milliseconds = speed_of(yaml.safe_load((done[0] / "config.yaml").read_text())["agent"])
        row = [f"{agent} ({len(done)})", *map(seeds, at.values()), interval(at[UPDATES[-1]])]
        row += [f"{speed:.0f}", f"{milliseconds:.2f} ms"]
        print("| " + " | ".join(row) + " |", flush=True)


def speed_of(settings: dict[str, Any]) -> tuple[float, float]:
    """Updates/s in a bare loop and the median latency of one decision in ms, both on one thread."""
    agent = build_agent(settings, CUBE)
    stream = BatchStream(random_transitions(agent), 256, 0, TIMED, (0, "speed"), SPAN)
    seconds = median([seconds_of_updates(agent, stream) for _ in range(ROUNDS + 1)][1:])
    return TIMED / seconds, latency(Policy(agent))["latency_ms_p50"]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data]:
            run(data)
        case ["table", *logs]:
            table(Path(logs[0]) if logs else LOGS)
        case _:
            sys.exit(__doc__)
