"""Pictures of a table: learning curves, performance profiles, probabilities of improvement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deflow.files import replacing
from deflow.reproduction.results import Result
from deflow.reproduction.statistics import enough_seeds, performance_profile, probability_of_improvement, profile_band
from deflow.reproduction.table import common_scores, improvement, task_name

LEVELS = 101  # at which a profile is drawn


class Curve(NamedTuple):
    """A line with a band around it; all sequences are of the same length."""

    agent: str
    label: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curves(results: Sequence[Result], row: str, task: int | None) -> Iterator[Curve]:
    """Each agent's evaluations on a task: the mean over seeds, and their range."""
    found = [result for result in results if (result.row, result.task) == (row, task)]
    for agent in dict.fromkeys(result.agent for result in found):
        of_seeds = [result.curve for result in found if result.agent == agent]
        at = {step: [curve[step] for curve in of_seeds if step in curve] for step in sorted(set().union(*of_seeds))}
        means = [float(np.mean(values)) for values in at.values()]
        low, high = ([bound(values) for values in at.values()] for bound in (min, max))
        yield Curve(agent, f"{agent} ({len(of_seeds)})", list(at), means, low, high)


def profiles(results: Sequence[Result]) -> Iterator[Curve]:
    """Each agent's performance profile over the runs `in_common`, with a 95% band by bootstrap if seeds are enough."""
    scores = common_scores(results)
    found = [float(value) for of_agent in scores.values() for values in of_agent for value in values]
    levels = np.linspace(min([0.0, *found]), max([100.0, *found]), LEVELS)
    for agent, own in scores.items():
        share = performance_profile(own, levels)
        band = profile_band(own, levels) if enough_seeds(own) else None
        low, high = band or (share, share)
        yield Curve(agent, agent, levels.tolist(), share.tolist(), low.tolist(), high.tolist())


def profile_title(results: Sequence[Result]) -> str:
    """What stands above the profiles; whether they have bands."""
    banded = all(enough_seeds(own) for own in common_scores(results).values())
    return "Performance profile" if banded else "Performance profile (too few seeds for a band)"


def measure(results: Sequence[Result], row: str) -> str:
    """What a row's values are, as an axis says it."""
    of_row = next(result.measure for result in results if result.row == row)
    return "success, %" if of_row == "success" else of_row


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """Learning curves, a panel a task."""
    tasks = list(dict.fromkeys((result.row, result.task) for result in results))

    def draw(panels: Sequence[Axes]) -> None:
        for axes, (row, task) in zip(panels, tasks, strict=True):
            _lines(axes, curves(results, row, task), marker="o")
            axes.set(title=task_name(row, task), xlabel="updates", ylabel=measure(results, row))

    _draw(path, len(tasks), draw)


def draw_profile(results: Sequence[Result], path: Path) -> None:
    """Performance profiles."""

    def draw(panels: Sequence[Axes]) -> None:
        _lines(panels[0], profiles(results), marker="")
        panels[0].set(title=profile_title(results), xlabel="score", ylabel="share of runs above it")

    _draw(path, 1, draw)


def draw_improvement(results: Sequence[Result], path: Path) -> None:
    """How probable it is that a run of the agent at the left is better than one of that below, over common tasks."""
    scores = common_scores(results)
    agents, of_agents = list(scores), list(scores.values())
    better = np.array([[probability_of_improvement(a, b) for b in of_agents] for a in of_agents])

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        axes.imshow(better.reshape(len(agents), -1), cmap="RdBu", vmin=0, vmax=1, aspect="auto")
        for (left, below), value in np.ndenumerate(better):
            if left != below:
                colour = "white" if abs(value - 0.5) > 0.35 else "black"
                said = improvement(of_agents[left], of_agents[below])
                text = said.replace(" (", "\n(")  # an interval on a line of its own
                axes.text(below, left, text, ha="center", va="center", color=colour, fontsize="x-small")
        axes.set_xticks(range(len(agents)), agents, rotation=45, ha="right")
        axes.set_yticks(range(len(agents)), agents)
        axes.set_title("P(left better than below)")

    _draw(path, 1, draw, size=(1.5 + 0.95 * len(agents), 1.2 + 0.5 * len(agents)))  # room for an interval in a cell


def _lines(axes: Axes, found: Iterator[Curve], marker: str) -> None:
    for curve in found:
        axes.plot(curve.x, curve.mean, marker=marker, markersize=3, label=curve.label)
        axes.fill_between(curve.x, curve.low, curve.high, alpha=0.15)
    axes.legend(fontsize="small")


def _draw(
    path: Path, panels: int, draw: Callable[[Sequence[Axes]], None], size: tuple[float, float] = (5, 3.6)
) -> None:
    """A picture of panels side by side, each of `size` in inches."""
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    draw([figure.add_subplot(rows, columns, number + 1) for number in range(panels)])
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
