"""What a run leaves behind: `summary.json`, `report.png` and the table at the end."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Container, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deflow.agents.panels import Panel
from deflow.description import commit
from deflow.evaluation.rollout import Episode
from deflow.files import replacing
from deflow.loggers import Row

# The papers report the mean over the last three evaluations.
LAST_EVALUATIONS = 3
EVALUATED = ("success", "score", "return", "length", "path_error")
LOWER_IS_BETTER = ("length", "path_error")


def summarise_run(
    rows: Sequence[Row],
    config: dict[str, Any],
    data: dict[str, Any],
    protocol: dict[str, Any],
    task: str,
    stage_speed: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """The run in one dictionary of plain values.

    `eval/success` and friends come as `last`, `mean_of_last_three` (the papers' number on OGBench) and `best`
    (for curiosity only: it is selected by evaluation and never to be reported as the result).
    """
    evaluations = [row for row in rows if "eval/return" in row]
    summary: dict[str, Any] = {
        "task": task,
        "agent": _agent_name(config),
        "seed": config["seed"],
        "seeds": config["seeds"],
        "n_step": config["data"]["n_step"],
        "horizon": config["agent"].get("horizon", 1),
        "stages": {name: stage["steps"] for name, stage in config["stages"].items()},
    }
    for key in EVALUATED:
        values = [row[f"eval/{key}"] for row in evaluations if f"eval/{key}" in row]
        if values:
            summary[f"eval/{key}"] = {
                "last": values[-1],
                "mean_of_last_three": float(np.mean(values[-LAST_EVALUATIONS:])),
                "best": min(values) if key in LOWER_IS_BETTER else max(values),
                "last_interval_95": [evaluations[-1][f"eval/{key}_low"], evaluations[-1][f"eval/{key}_high"]],
                "last_of_stage": _last_of_stages(evaluations, key, summary["stages"]),
            }
    if config["seeds"] > 1 and evaluations:
        seeds = range(config["seed"], config["seed"] + config["seeds"])
        measure = _measure(summary)
        summary[measure]["last_of_seed"] = {seed: evaluations[-1][f"{measure}/seed_{seed}"] for seed in seeds}
    return summary | {
        "evaluations": len(evaluations),
        "eval_episodes": config["eval"]["episodes"],
        "updates": int(max((row["step"] for row in rows), default=0)),
        "updates_per_second": stage_speed,
        "seconds": seconds,
        "peak_memory_mib": _peak_memory_mib(),
        "data": data,
        **protocol,
        "iav": config["iav"]["result"],
        "commit": commit() or None,
        "versions": {name: version(name) for name in ("deflow", "torch", "lightning", "ogbench", "mujoco", "numpy")},
    }


def _measure(found: Container[str]) -> str:
    """The measure by which evaluations are compared: success, or the return where success is not measured."""
    return "eval/success" if "eval/success" in found else "eval/return"


def _last_of_stages(evaluations: Sequence[Row], key: str, stages: Mapping[str, int]) -> dict[str, float]:
    """The last evaluation in each stage that had one."""
    found: dict[str, float] = {}
    first = 0
    for name, steps in stages.items():
        values = [row[f"eval/{key}"] for row in evaluations if first < row["step"] <= first + steps]
        found |= {name: values[-1]} if values else {}
        first += steps
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, whole or not at all; numbers that are not finite, which JSON does not have, become null."""
    with replacing(path) as part:
        part.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """The content with None in the place of numbers that are not finite, as a file of JSON will have it."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    if isinstance(content, tuple):
        return tuple(finite(value) for value in content)
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_table(summary: dict[str, Any], folder: Path) -> None:
    """The result as a table on the terminal."""
    table = Table(title=f"{summary['agent']} on {summary['task']}, {_seeds(summary)}", show_header=True)
    for column in ("", "last", "95% interval", f"mean of last {LAST_EVALUATIONS}", "best"):
        table.add_column(column, justify="right" if column else "left")
    for key in EVALUATED:
        result = summary.get(f"eval/{key}")
        if result:
            low, high = result["last_interval_95"]
            last, mean, best = (_number(result[of]) for of in ("last", "mean_of_last_three", "best"))
            table.add_row(key, last, f"{_number(low)} to {_number(high)}", mean, best)
    console = Console()
    console.print(table if table.rows else table.title)  # nothing was evaluated
    measure = _measure(summary)
    name, result = measure.removeprefix("eval/"), summary.get(measure, {})
    if table.rows and name != "success":
        console.print("success: not measured, the environment does not say")
    stages = result.get("last_of_stage", {})
    if len(stages) > 1:
        console.print(f"{name} {' -> '.join(f'{_number(value)} ({stage})' for stage, value in stages.items())}")
    of_seeds = result.get("last_of_seed", {})
    if of_seeds:
        console.print(f"{name} of each seed: {', '.join(map(_number, of_seeds.values()))}")
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in summary["updates_per_second"].items())
    speeds += f" (each of {summary['seeds']} seeds)" if summary["seeds"] > 1 else ""
    data = "GENERATED here, not the published set" if summary["data"]["generated"] else summary["data"]["path"]
    timing = f", success timing '{summary['success_timing']}'" if "success_timing" in summary else ""
    console.print(f"data: {summary['data']['name']} ({data}); {summary['protocol']}, {_chunking(summary)}{timing}")
    console.print(
        f"updates/s: {speeds}; {summary['seconds'] / 60:.1f} min; {summary['peak_memory_mib']:.0f} MiB at peak"
    )
    if "diversity" in summary:
        console.print(_diversity_line(summary["diversity"]))
    if "error" in summary.get("dynamics", {}):
        console.print(_dynamics_line(summary["dynamics"]["error"]))
    for name in ("report.png", "actions.png", "transitions.png", "video.mp4"):
        if (folder / name).exists():
            console.print(f"{folder / name}", soft_wrap=True)


def _number(value: float | None, form: str = ".2f") -> str:
    """A number of a summary, or a dash for one that was not finite."""
    return "-" if value is None else f"{value:{form}}"


def _chunking(result: Mapping[str, Any]) -> str:
    horizon = result.get("horizon", 1)
    return "no action chunking" if horizon == 1 else f"chunks of {horizon} actions"


def _dynamics_line(errors: dict[str, dict[str, float]]) -> str:
    """`error of the model of steps after 1, 5, 25 steps: sample 0.01, 0.05, 0.3; ... standard deviations`."""
    steps = ", ".join(next(iter(errors.values())))
    shown = {name: ", ".join(_number(error, ".2g") for error in by_steps.values()) for name, by_steps in errors.items()}
    of_each = "; ".join(f"{name} {numbers}" for name, numbers in shown.items())
    return f"error of the model of steps after {steps} steps, in deviations of the state: {of_each}"


def _diversity_line(diversity: dict[str, Any]) -> str:
    """`at 128 states: modes (data 1.40, proposal 1.35, policy 1.10); variance ...`."""
    shown = []
    for key in ("modes", "variance", "distance_to_data"):
        numbers = ", ".join(f"{name} {_number(value, '.3g')}" for name, value in diversity[key].items())
        shown.append(f"{key.replace('_', ' ')} ({numbers})")
    return f"at {diversity['states']} states: {'; '.join(shown)}"


def print_evaluation(result: dict[str, Any]) -> None:
    """The result of `evaluate.py` as a table on the terminal."""
    table = Table(title=f"{result['task']}, {result['episodes']:.0f} episodes")
    for column in ("", "mean", "95% interval"):
        table.add_column(column, justify="right" if column else "left")
    for key in (key for key in EVALUATED if key in result):
        table.add_row(key, f"{result[key]:.2f}", f"{result[f'{key}_low']:.2f} to {result[f'{key}_high']:.2f}")
    Console().print(table)
    p50, p99, calls = (result[f"latency_{name}"] for name in ("ms_p50", "ms_p99", "calls"))
    Console().print(f"one decision: {p50:.2f} ms (99%: {p99:.2f} ms; of {calls} calls)")


def draw(
    rows: Sequence[Row],
    episodes: Sequence[Episode],
    panels: Sequence[Panel],
    path: Path,
    config: dict[str, Any],
    task: str,
) -> None:
    """What the agent shows of its training, success and, in mazes, the visited paths, in one picture."""
    logged = {key for row in rows for key in row}
    panels = [panel for panel in panels if logged & panel.curves.keys()]
    in_maze = any(episode.path for episode in episodes)
    pictures = len(panels) + 1 + in_maze
    columns = -(-pictures // 2) if pictures > 3 else pictures
    lines = -(-pictures // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    figure.suptitle(f"{_agent_name(config)} on {task}, {_seeds(config)}")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _curves(axis, rows, panel)
    _success(axes[len(panels)], rows)
    for axis in axes[: len(panels) + 1]:
        _over_updates(axis, rows, config)
    if in_maze:
        _paths(axes[len(panels) + 1], episodes)
    for axis in axes[pictures:]:
        axis.set_axis_off()
    with replacing(path) as part:
        figure.savefig(part, dpi=80)


def _over_updates(axis: Axes, rows: Sequence[Row], config: dict[str, Any]) -> None:
    """The axis of updates, with a line where one stage gives way to the next."""
    for switch in np.cumsum([stage["steps"] for stage in config["stages"].values()])[:-1]:
        axis.axvline(switch, color="tab:gray", linestyle=":", linewidth=1)
    axis.set(xlabel="updates", xlim=(0, max((row["step"] for row in rows), default=1.0)))


def _seeds(settings: Mapping[str, Any]) -> str:
    first, count = settings["seed"], settings["seeds"]
    return f"seed {first}" if count == 1 else f"seeds {first} to {first + count - 1}"


def _agent_name(config: dict[str, Any]) -> str:
    return str(config["agent"]["_target_"]).rsplit(".", 1)[-1]


def _curves(axis: Axes, rows: Sequence[Row], panel: Panel) -> None:
    for key, label in panel.curves.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            marker = "o" if len(points) == 1 else ""  # one point makes no line
            axis.plot(*zip(*points, strict=True), marker=marker, label=label, lw=1)
    if panel.limit is not None:
        axis.axhline(panel.limit, color="k", ls="--", lw=1, label="limit")
    axis.set(title=panel.title)
    axis.legend(fontsize=8)
    axis.set_yscale("log" if panel.log else "linear")


def _success(axis: Axes, rows: Sequence[Row]) -> None:
    key = _measure({key for row in rows for key in row})
    points = [(row["step"], row[key], row[f"{key}_low"], row[f"{key}_high"]) for row in rows if key in row]
    axis.set(title=f"{key.removeprefix('eval/')}, 95% interval")
    if key == "eval/success":
        axis.set(ylim=(-0.02, 1.02))
    if points:
        steps, success, low, high = (np.array(column) for column in zip(*points, strict=True))
        axis.errorbar(
            steps, success, (success - low, high - success), fmt="o-", capsize=3, color="tab:green", clip_on=False
        )
    online = key.replace("eval/", "online/")
    played = [(row["step"], row[online]) for row in rows if online in row]
    if played:
        axis.plot(*zip(*played, strict=True), ".", color="tab:gray", markersize=3, label="episodes learnt from, online")
        axis.legend(fontsize=8)


def _paths(axis: Axes, episodes: Sequence[Episode]) -> None:
    for episode in episodes:
        x, y = np.array(episode.path).T
        axis.plot(x, y, lw=0.7, alpha=0.7, color="tab:green" if episode.success else "tab:red")
        axis.plot(x[-1], y[-1], "k.", ms=3)
    axis.set(title="paths of the last evaluation (green: success)", aspect="equal")


def _peak_memory_mib() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return peak + (torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0)
