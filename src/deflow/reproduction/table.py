"""A table of results: ours, the papers', and whether the two agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from deflow.errors import UserError
from deflow.reproduction.layout import layout
from deflow.reproduction.published import AVERAGE, OGBENCH_TASKS, Published, find, published, tables
from deflow.reproduction.results import Result, why_not_published
from deflow.reproduction.statistics import (
    ENOUGH_SEEDS,
    Estimate,
    Interval,
    Verdict,
    difference_interval,
    enough_seeds,
    improvement_interval,
    interquartile_mean,
    interval,
    mean_and_deviation,
    probability_of_improvement,
    seed_interval,
    stratified_bootstrap,
    verdict,
)

LEGEND = (
    "ours: mean ± standard deviation over seeds; 95%: of the mean over seeds (Student's t), or over episodes (Wilson) "
    "where there is one seed or all are equal."
)
INSIDE = (
    " A cell is inside if that interval meets the published one, which is at least as wide as two honest published "
    "runs of a cell differ."
)
BOOTSTRAP = (
    "The 95% of an IQM and of a probability is by bootstrap of the seeds within each task; it is left out below "
    f"{ENOUGH_SEEDS} seeds, with which it is far too narrow."
)
RERUN = "optiflow_state"  # a third party's re-run of the baselines: how far two honest runs of a cell are apart


@dataclass(frozen=True)
class Cell:
    """What the runs of an agent on one task, or on all tasks of a row, came to; in % or D4RL's score."""

    row: str
    task: int | None  # None: the row's mean over its tasks, or its only one
    agent: str
    seeds: int
    mean: float
    deviation: float | None
    interval: Interval | None  # 95%, of the mean over seeds
    online: bool  # whether there is a before
    before: float | None  # online: the mean before; None where nothing was learnt offline
    published: Published | None
    verdict: Verdict | None
    reason: str | None  # why there is none


def cells_of(table: str, results: Sequence[Result]) -> list[Cell]:
    """A cell for each task and agent, one for each row of several tasks, and the average over all of a table's rows.

    In the results' order; the average is that of agents with all tasks of all rows.
    """
    cells = []
    for row in dict.fromkeys(result.row for result in results):
        tasks = list(dict.fromkeys(result.task for result in results if result.row == row))
        groups: list[tuple[int | None, list[int | None]]] = [(task, [task]) for task in tasks]
        if len(tasks) > 1:
            groups.append((None, tasks))
        for task, of_tasks in groups:
            found = [result for result in results if result.row == row and result.task in of_tasks]
            for agent in dict.fromkeys(result.agent for result in found):
                of_agent = [result for result in found if result.agent == agent]
                cells.append(_cell(table, row, task, agent, of_agent))
    return [*cells, *_averages(table, results)]


def _averages(table: str, results: Sequence[Result]) -> Iterator[Cell]:
    if table not in tables() or all(cell.row != AVERAGE for cell in published(table)):
        return
    whole = {(row, task) for row, task, _ in layout(table).cells}
    for agent in dict.fromkeys(result.agent for result in results):
        found = [result for result in results if result.agent == agent]
        if {(result.row, result.task) for result in found} == whole:
            yield _cell(table, AVERAGE, None, agent, found)


def _cell(table: str, row: str, task: int | None, agent: str, results: Sequence[Result]) -> Cell:
    paired = _of_common_seeds(results)  # a seed has a mean over tasks only if it has them all
    scores = _by_task(paired or results)
    mean, deviation = mean_and_deviation(scores)
    known = find(table, row, agent, task) if table in tables() else None
    reason = next((why for why in (why_not_published(table, result) for result in results) if why), None)
    tasks = {result.task for result in results}
    if reason is None and row != AVERAGE and task is None and tasks not in ({None}, set(OGBENCH_TASKS)):
        reason = "the published mean is over more tasks"
    if reason is None and known is None:
        reason = "not published"
    beside = known if reason is None else None
    is_share = all(result.is_share for result in results)
    spread = _interval(scores, results[0].episodes, is_share) if paired else None
    if reason is None:
        reason = _why_not_sure(scores, spread)
    return Cell(
        row=row,
        task=task,
        agent=agent,
        seeds=min(len(values) for values in scores),
        mean=mean,
        deviation=deviation if paired else None,
        interval=spread,
        online=results[0].identity.get("value") == "before_and_after",
        before=_mean_before(paired or results),
        published=beside,
        verdict=None if reason is not None or known is None else _verdict(table, known, Estimate(mean, spread)),
        reason=reason,
    )


def _mean_before(results: Sequence[Result]) -> float | None:
    known = [result.before for result in results if result.before is not None]
    return float(np.mean(known)) if len(known) == len(results) else None


def _why_not_sure(scores: Sequence[np.ndarray], spread: Interval | None) -> str | None:
    """Why too little is known of the spread over seeds for a verdict; None if it is enough."""
    if min(len(values) for values in scores) < 2:
        return "one seed says nothing of the spread over seeds, which is wider than that over its episodes"
    return "nothing is known of the spread over seeds" if spread is None else None


def _of_common_seeds(results: Sequence[Result]) -> Sequence[Result]:
    """Those of the seeds that all tasks have."""
    of_tasks: dict[tuple[str, int | None], set[int]] = {}
    for result in results:
        of_tasks.setdefault((result.row, result.task), set()).add(result.seed)
    common = set.intersection(*of_tasks.values())
    return [result for result in results if result.seed in common]


def _by_task(results: Sequence[Result]) -> list[np.ndarray]:
    """The values of each task, by their seeds."""
    results = sorted(results, key=lambda result: result.seed)
    tasks = dict.fromkeys((result.row, result.task) for result in results)
    return [
        np.array([result.value for result in results if (result.row, result.task) == task], np.float64)
        for task in tasks
    ]


def _interval(scores: Sequence[np.ndarray], episodes: int, is_share: bool) -> Interval | None:
    """Of the mean over seeds of a seed's mean over tasks, all of which have the same seeds."""
    of_seeds = np.mean(scores, axis=0)
    if not is_share:
        return None if np.ptp(of_seeds) == 0 else seed_interval(of_seeds)
    low, high = interval(of_seeds.clip(0, 100) / 100, episodes * len(scores))
    return max(0.0, 100 * low), min(100.0, 100 * high)


def _verdict(table: str, known: Published, ours: Estimate) -> Verdict:
    return verdict(ours, known.value, known.deviation, known.seeds or 1, tolerance(known.row, known.agent))


def tolerance(row: str, agent: str) -> float:
    """How far two honest published runs of a cell are apart, in %: a third party ran many again.

    Where a cell was not, and at least, it is the median over those that were.
    """
    again = {(cell.row, cell.agent): cell.mean for cell in published(RERUN)}
    first = {(cell.row, cell.agent): cell.mean for cell in published("ogbench_state") if cell.task is None}
    distances = {
        key: abs(mean - other)
        for key, mean in again.items()
        if mean is not None and (other := first.get(key)) is not None
    }
    usual = median(distances.values())
    return max(usual, distances.get((row, agent), usual))


def markdown(title: str, cells: Sequence[Cell]) -> str:
    """Every cell in a line of its own, and below it why some have no verdict."""
    lines = [
        f"## {title}",
        "",
        "| task | agent | seeds | ours | 95% | published | difference | verdict |",
        "|---" * 8 + "|",
    ]
    lines += [_line(texts(cell)) for cell in cells]
    lines += ["", legend(cells)]
    if found := reasons(cells):
        lines += ["", "No verdict: " + "; ".join(found) + "."]
    return "\n".join(lines) + "\n"


def _line(texts: Iterable[str]) -> str:
    """Lines of a table in Markdown."""
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"


def legend(cells: Sequence[Cell]) -> str:
    """What the columns are."""
    return LEGEND + (INSIDE if any(cell.verdict for cell in cells) else "")


def reasons(cells: Sequence[Cell]) -> list[str]:
    """Why some cells have no verdict, each once."""
    return list(dict.fromkeys(cell.reason for cell in cells if cell.reason is not None))


def task_name(row: str, task: int | None) -> str:
    """What tables and pictures call it."""
    return row if task is None else f"{row} task {task}"


def texts(cell: Cell) -> list[str]:
    """What stands in the columns task, agent, seeds, ours, 95%, published, difference, verdict."""
    return list(_texts(cell))


def _texts(cell: Cell) -> Iterator[str]:
    yield task_name(cell.row, cell.task)
    yield cell.agent
    yield str(cell.seeds)
    yield (f"{_before(cell, '-')} → " if cell.online else "") + _plus_minus(cell.mean, cell.deviation)
    yield "-" if cell.interval is None else _from_to(cell.interval)
    known = cell.published
    if known is None:
        yield from ("-", "-", "-")
        return
    shown = _plus_minus(known.value, known.deviation)
    yield shown if known.before is None else f"{known.before:.0f} → {known.value:.0f}"
    yield f"{round(cell.mean - known.value):+d}"
    yield cell.verdict or "-"


def _before(cell: Cell, unknown: str) -> str:
    return unknown if cell.before is None else f"{cell.before:.0f}"


def _from_to(interval: Interval) -> str:
    """The interval with as many decimals as keep its ends apart."""
    low, high = next(
        (ends for decimals in range(4) if len(set(ends := [f"{end:.{decimals}f}" for end in interval])) > 1),
        interval,
    )
    return f"{low} to {high}"


def _plus_minus(mean: float, deviation: float | None) -> str:
    return f"{mean:.0f}" if deviation is None else f"{mean:.0f} ± {deviation:.0f}"


def latex(cells: Sequence[Cell]) -> str:
    """Tasks down, agents across, for the package booktabs; the published number and the difference in parentheses."""
    agents = list(dict.fromkeys(cell.agent for cell in cells))
    places = {(cell.row, cell.task, cell.agent): cell for cell in cells}
    lines = [
        r"\begin{tabular}{l" + "c" * len(agents) + "}",
        r"\toprule",
        " & ".join(["", *map(_escaped, agents)]) + r" \\",
        r"\midrule",
    ]
    for row, task in dict.fromkeys((cell.row, cell.task) for cell in cells):
        line = [_escaped(row if task is None else f"{row} {task}")]
        for agent in agents:
            cell = places.get((row, task, agent))
            line.append("--" if cell is None else _in_latex(cell))
        lines.append(" & ".join(line) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    """A name as LaTeX prints it."""
    return re.sub(r"[&%$#_{}]", r"\\\g<0>", text.replace("\\", "/")).replace("~", " ").replace("^", r"\^{}")


def _in_latex(cell: Cell) -> str:
    deviation = "" if cell.deviation is None else rf" \pm {cell.deviation:.0f}"
    before = rf"{_before(cell, '-')} \to " if cell.online else ""
    known = cell.published
    beside = "" if known is None else f" ({known.value:.0f}, ${cell.mean - known.value:+.0f}$)"
    return f"${before}{cell.mean:.0f}{deviation}${beside}"


def summary(results: Sequence[Result]) -> str:
    """What all tasks together say of each agent: interquartile mean, and the probability that it is better than others.

    Over the tasks that all agents have, and the seeds that all have of them.
    """
    scores = common_scores(results)
    if len(scores) < 2:
        return ""
    lines = [_line(["agent", "IQM", "95%", *(f"better than {agent}" for agent in scores)])]
    lines.append("|---" * (3 + len(scores)) + "|")
    for agent, own in scores.items():
        spread = stratified_bootstrap(own, interquartile_mean) if enough_seeds(own) else None
        # Where all seeds are equal nothing is known of their spread.
        known = _from_to(spread) if spread is not None and spread[0] < spread[1] else "-"
        line = [agent, f"{interquartile_mean(own):.0f}", known]
        line += ["-" if other is own else improvement(own, other) for other in scores.values()]
        lines.append(_line(line))
    seeds = sorted({result.seed for result in in_common(results)})
    of = f"{len(next(iter(scores.values())))} tasks and the seeds that every agent has of them all"
    lines += ["", f"IQM: mean of the middle half of all runs, over {of} ({', '.join(map(str, seeds))}). {BOOTSTRAP}"]
    return "\n".join(lines) + "\n"


def improvement(ours: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> str:
    """How probable it is that a run of ours is better than one of another, with an interval if seeds are enough."""
    shown = f"{probability_of_improvement(ours, others):.2f}"
    spread = improvement_interval(ours, others) if enough_seeds([*ours, *others]) else None
    return shown if spread is None else f"{shown} ({spread[0]:.2f} to {spread[1]:.2f})"


def poolable(results: Sequence[Result]) -> bool:
    """Whether there are runs that agents may be compared by over all tasks: returns may be in one task alone."""
    return bool(in_common(results))


def in_common(results: Sequence[Result]) -> list[Result]:
    """Those of the tasks that all agents have, and of the seeds that all agents have of them all.

    With other seeds, agents would be compared over different mixtures of tasks. Empty if there are none, or their
    values do not mean the same.
    """
    measures = {result.measure for result in results}
    rows = {(result.row, result.task) for result in results}
    if len(measures) > 1 or (measures == {"return"} and len(rows) > 1):
        return []
    runs = {(result.agent, (result.row, result.task), result.seed) for result in results}
    agents = {agent for agent, _, _ in runs}
    tasks = {task for _, task, _ in runs if agents == {agent for agent, its_task, _ in runs if its_task == task}}
    seeds = {seed for _, _, seed in runs if runs.issuperset((a, t, seed) for a in agents for t in tasks)}
    return [result for result in results if (result.row, result.task) in tasks and result.seed in seeds]


def common_scores(results: Sequence[Result]) -> dict[str, list[np.ndarray]]:
    """Agent -> the scores of each task, of the runs `in_common`."""
    found = in_common(results)
    agents = dict.fromkeys(result.agent for result in found)
    return {agent: _by_task([result for result in found if result.agent == agent]) for agent in agents}


def compare(ours: Sequence[Result], others: Sequence[Result]) -> str:
    """Two files of results, such as of two versions of the code, cell by cell, as Markdown.

    Commands that ask for different things are shown, not refused: versions differ in the names of settings, too.

    Raises:
        UserError: if they have no cell in common, or one of another protocol.
    """
    both = [_grouped(results) for results in (ours, others)]
    shared = [key for key in both[0] if key in both[1]]
    if not shared:
        raise UserError("the two files have no cell in common")
    lines = ["| task | agent | A | B | B - A | 95% | P(B > A) |", "|---" * 7 + "|"]
    asked: list[str] = []
    for key in shared:
        a, b = (of_file[key] for of_file in both)
        names = (a[0].identity | b[0].identity).keys() - {"changed"}  # what was is shown below
        differing = min((name for name in names if a[0].identity.get(name) != b[0].identity.get(name)), default=None)
        if differing is not None:
            raise UserError(f"{key[0]} of {key[2]} is of another protocol in the two files: {differing} differs")
        before, after = (np.array([result.value for result in results]) for results in (a, b))
        shown = [_plus_minus(*mean_and_deviation([values])) + f" ({len(values)})" for values in (before, after)]
        spread = difference_interval(after, before)
        between = "-" if spread is None else f"{spread[0]:+.1f} to {spread[1]:+.1f}"
        difference = f"{after.mean() - before.mean():+.1f}"
        better = improvement([after], [before])
        lines.append(_line([task_name(key[0], key[1]), key[2], *shown, difference, between, better]))
        asked += _asked_otherwise(f"{task_name(key[0], key[1])}, {key[2]}", a, b)
    lines += ["", *asked] if asked else []
    lines += ["", f"95%: of B - A (Welch's t over seeds). {BOOTSTRAP}"]
    return "\n".join(lines) + "\n"


def _asked_otherwise(cell: str, a: Sequence[Result], b: Sequence[Result]) -> list[str]:
    """A line on what commands of one file's runs ask for that none of the other's does, or not as many."""
    ours, theirs = (Counter(setting for run in of_file for setting in run.asked_for) for of_file in (a, b))
    shares = {setting: (ours[setting] / len(a), theirs[setting] / len(b)) for setting in sorted(ours | theirs)}
    found = []
    for file, alone in (("A", (1, 0)), ("B", (0, 1))):
        if settings := [setting for setting, share in shares.items() if share == alone]:
            found.append(f"{file} alone has {' '.join(settings)}")
    for setting, (of_a, of_b) in shares.items():
        if of_a != of_b and {of_a, of_b} != {0, 1}:
            found.append(f"{setting} in {ours[setting]} of {len(a)} runs of A and {theirs[setting]} of {len(b)} of B")
    return [f"- **Other settings** in {cell}: {'; '.join(found)}."] if found else []


def _grouped(results: Sequence[Result]) -> dict[tuple[str, int | None, str], list[Result]]:
    grouped: dict[tuple[str, int | None, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.row, result.task, result.agent), []).append(result)
    return grouped
