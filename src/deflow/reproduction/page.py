"""A table as one HTML file: sorting, curves under the cursor, links to every run; it needs no network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader

from deflow.reproduction.plots import Curve, curves, measure, profile_title, profiles
from deflow.reproduction.results import Result, commits_of
from deflow.reproduction.table import Cell, legend, reasons, task_name, texts

OF_A_RUN = ("report.png", "actions.png", "transitions.png", "video.mp4", "train.log", "summary.json")
COLOURS = (  # Okabe and Ito's, which colour-blind people tell apart; without black and yellow, for both backgrounds
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
    *("#8c6bb1", "#7f7f7f", "#b15928", "#33a02c", "#e7298a", "#1f9e9e"),
)


def is_possible() -> bool:
    """Whether the package that draws is there."""
    return importlib.util.find_spec("plotly") is not None


def page(title: str, cells: Sequence[Cell], results: Sequence[Result], folder: Path) -> str:
    """The page's text.

    Args:
        title: of the table.
        cells: of the table.
        results: the runs behind them.
        folder: where the page comes to lie; links to the runs are relative to it.
    """
    from plotly.offline import get_plotlyjs

    template = Environment(loader=PackageLoader("deflow.reproduction"), autoescape=True).get_template("page.html")
    return template.render(
        title=title,
        legend=legend(cells),
        reasons=reasons(cells),
        cells=[(cell, texts(cell)) for cell in cells],
        runs=[(result, list(_links(Path(result.folder), folder))) for result in results],
        commits=commits_of(results),
        versions=sorted({f"{name} {number}" for result in results for name, number in result.versions.items()}),
        plots=list(_plots(results)),
        plotly=get_plotlyjs(),
    )


def _links(run: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and relative address of what a run has left."""
    for name in OF_A_RUN:
        if (run / name).exists():
            yield name, quote(Path(os.path.relpath(run / name, folder.absolute())).as_posix())


def _plots(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """What Plotly draws: a title, traces, and the names of the axes."""
    colours = dict(zip(dict.fromkeys(result.agent for result in results), COLOURS * len(results), strict=False))
    for row, task in dict.fromkeys((result.row, result.task) for result in results):
        drawn = [trace for curve in curves(results, row, task) for trace in _band(curve, colours[curve.agent])]
        yield {"title": task_name(row, task), "traces": drawn, "x": "updates", "y": measure(results, row)}
    drawn = [trace for curve in profiles(results) for trace in _band(curve, colours[curve.agent])]
    if drawn:
        yield {"title": profile_title(results), "traces": drawn, "x": "score", "y": "share of runs above it"}


def _band(curve: Curve, colour: str) -> Iterator[dict[str, Any]]:
    """The band first, so that it lies below; one entry in the legend shows and hides both."""
    together = {"legendgroup": curve.agent, "name": curve.label}
    yield together | {
        "x": [*curve.x, *reversed(curve.x)],
        "y": [*curve.high, *reversed(curve.low)],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": colour,
        "opacity": 0.15,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    yield together | {
        "x": list(curve.x),
        "y": list(curve.mean),
        "mode": "lines+markers" if len(curve.x) < 50 else "lines",
        "line": {"color": colour},
        "hovertemplate": "%{y:.3g} at %{x:,}",
    }
