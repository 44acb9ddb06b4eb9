"""Every agent on two tasks, trained for as long as FQL takes for 60,000 updates.

python studies/agents.py run FOLDER      trains every agent on both tasks with both seeds; FOLDER holds
                                         cube-single-play-v0.npz and scene-play-v0.npz
python studies/agents.py table [LOGS]    prints the tables of docs/results.md; measures speed, so let nothing else run
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from common import LOGS, TASKS, interval, runs, seeds, success_of, task_settings, train_once

from deflow.benchmark import SPAN, random_transitions
from deflow.build import build_agent
from deflow.data.datamodule import BatchStream
from deflow.evaluation.latency import latency
from deflow.policy import Policy
from deflow.timing import seconds_of_updates
from deflow.types import Spec

SEEDS = (0, 1)
# What the schedules of some are, so that they take about as long; all else is what is tuned for the task.
AGENTS: dict[str, Sequence[str]] = {
    "deflow": (),
    "fql": (),
    "ifql": (),
    "fbrac": (),
    "fawac": (),
    "flow_bc": (),
    "bc": (),
    "iql": (),
    "rebrac": (),
    "idql": ("data.batch_size=256", "agent.value_share=1"),
    "srpo": (
        "stages=srpo",
        "stages.behavior.steps=25_000",
        "stages.values.steps=45_000",
        "updates=30_000",
        "eval.every=7_500",
    ),
    "cac": ("updates=20_000", "eval.every=5_000"),
}
QUARTERS = 4  # of the training of the policy, after each of which there is an evaluation
TIMED, ROUNDS = 50, 5  # updates of a round
CUBE = Spec(observation_dim=28, action_dim=5)


def run(data: Path) -> None:
    """Train every agent on every task with every seed."""
    for seed in SEEDS:
        for task in TASKS:
            for agent, schedule in AGENTS.items():
                settings = ["experiment=original_comparison", *task_settings(task, data), f"agent={agent}"]
                train_once(LOGS / f"agents_{task}_{agent}" / f"seed_{seed}", [*settings, f"seed={seed}", *schedule])


def table(logs: Path) -> None:
    """Print, for each task, success over the seeds after each quarter, updates/s and latency."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    columns = ["agent (seeds)", *(f"{n}/{QUARTERS}" for n in range(1, QUARTERS + 1)), "95% at the end"]
    columns += ["updates/s", "latency"]
    for task in TASKS:
        print(f"\n{task}:\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for agent in AGENTS:
            done = runs(logs, f"agents_{task}_{agent}")
            if done:
                print("| " + " | ".join(_row(agent, done)) + " |", flush=True)


def _row(agent: str, done: Sequence[Path]) -> list[str]:
    curves = [list(success_of(folder).values()) for folder in done]
    after = [list(successes) for successes in zip(*curves, strict=True)]
    speed, milliseconds = speed_of(yaml.safe_load((done[0] / "config.yaml").read_text())["agent"])
    row = [f"{agent} ({len(done)})", *map(seeds, after), interval(after[-1])]
    return [*row, f"{speed:.0f}", f"{milliseconds:.2f} ms"]


def speed_of(settings: dict[str, Any]) -> tuple[float, float]:
    """Joint updates/s in a bare loop and the median latency of one decision in ms, both on one thread."""
    agent = build_agent(settings, CUBE)
    stream = BatchStream(random_transitions(agent), 256, 0, TIMED, (0, "speed"), SPAN)
    seconds = median([seconds_of_updates(agent, stream) for _ in range(ROUNDS + 1)][1:])
    return TIMED / seconds, latency(Policy(agent))["latency_ms_p50"]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", data]:
            run(Path(data))
        case ["table", *logs]:
            table(Path(logs[0]) if logs else LOGS)
        case _:
            sys.exit(__doc__)
