"""The papers' published numbers, a CSV file a table, and which run each is to be compared with.

A row is one environment by its name in `configs/task.yaml` with dashes, and an OGBench one has tasks 1 to 5. Numbers
are success in %, or D4RL's normalised score. OptiFlow's table is a third party's re-run of the baselines.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deflow.config import CONFIG_DIR
from deflow.errors import UserError
from deflow.tables import read_table

AVERAGE = "average"  # the row of a table's mean over its other rows
OGBENCH_TASKS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Published:
    """One cell of a published table.

    Attributes:
        row: the environment, such as `cube-single` or `pen-human-v1`, or `average`.
        task: of OGBench; None for the mean over a row's tasks, for D4RL and for `average`.
        agent: the algorithm, a choice of the group agent.
        mean: over the seeds; None online.
        deviation: standard deviation over the seeds; None where it is not known.
        seeds: runs behind the number; None where it was copied from a paper of another protocol.
        source: the paper, and its table where that is known.
        before: offline to online alone: after the offline updates.
        after: the same run after the online ones.
    """

    row: str
    task: int | None
    agent: str
    mean: float | None
    deviation: float | None
    seeds: int | None
    source: str
    before: float | None = None
    after: float | None = None

    @property
    def value(self) -> float:
        """What a run's value is held against: the mean, or online what came after."""
        found = self.after if self.mean is None else self.mean
        assert found is not None, "a cell has one of the two"
        return found


def tables() -> list[str]:
    """Names of the tables."""
    return sorted(path.stem for path in _folder().glob("*.csv"))


def published(table: str) -> list[Published]:
    """Every cell of a table, row by row.

    Raises:
        UserError: if there is no such table.
    """
    _known("table", table, tables())
    return list(_cells(_folder() / f"{table}.csv"))


def find(table: str, row: str, agent: str, task: int | None = None) -> Published | None:
    """The cell of an agent, or None if it is not published.

    Args:
        task: None is the row's own number: the mean over its tasks, or that of the only task it has in this table.

    Raises:
        UserError: if there is no such table, or the row or the agent is nowhere in it.
    """
    cells = _row(table, row)
    _known(f"agent of {table}", agent, (cell.agent for cell in published(table)))
    if task is None:
        task = _only_task(cells)
    return next((cell for cell in cells if (cell.agent, cell.task) == (agent, task)), None)


def overrides(table: str, row: str, task: int | None = None) -> list[str]:
    """The arguments of `train.py` that choose a task; its stages follow from the table and the agent.

    Args:
        task: may be left out where the row has only one task in this table.

    Raises:
        UserError: if there is no such table, row or task, or the choice is a mean over several.
    """
    cells = _row(table, row)
    if row == AVERAGE:
        rows = (cell.row for cell in published(table) if cell.row != AVERAGE)
        raise UserError(f"row '{AVERAGE}' of {table} is a mean over others: choose one of {_listed(rows)}")
    name, data = _tasks()[row]
    if data != "ogbench":
        if task is not None:
            raise UserError(f"row '{row}' of {table} is one task: leave out task {task}")
        return [f"task={name}"]
    if task is None:
        task = _only_task(cells)
    known = {cell.task for cell in cells} - {None} or OGBENCH_TASKS
    if task is None:
        raise UserError(f"row '{row}' of {table} is a mean over tasks: choose one of {_listed(map(str, known))}")
    _known(f"task of {row} in {table}", str(task), map(str, known))
    return [f"task={name}", f"task_id={task}"]


def _folder() -> Path:
    return Path(CONFIG_DIR) / "published"


@cache
def _cells(path: Path) -> tuple[Published, ...]:
    with path.open(newline="") as file:
        return tuple(_cell(line) for line in csv.DictReader(file))


def _cell(line: dict[str, str]) -> Published:
    """A line of a file; what is empty, or no column of this table, is None."""

    def whole(column: str) -> int | None:
        return int(line[column]) if line[column] else None

    def number(column: str) -> float | None:
        return float(line[column]) if line.get(column) else None

    return Published(
        row=line["row"],
        task=whole("task"),
        agent=line["agent"],
        mean=number("mean"),
        deviation=number("deviation"),
        seeds=whole("seeds"),
        source=line["source"],
        before=number("before"),
        after=number("after"),
    )


def _row(table: str, row: str) -> list[Published]:
    """The cells of a row, which must be in the table."""
    cells = published(table)
    _known(f"row of {table}", row, (cell.row for cell in cells))
    return [cell for cell in cells if cell.row == row]


def _only_task(cells: Iterable[Published]) -> int | None:
    """The task of a row that has only one; None if there are several, and so a mean, or none."""
    (first, *others) = {cell.task for cell in cells}
    return None if others else first


@cache
def _tasks() -> dict[str, tuple[str, str]]:
    """Row -> the task's name in the configuration, and its choice of the group data."""
    named = read_table(Path(CONFIG_DIR) / "task.yaml")
    return {name.replace("_", "-"): (name, content["data"]) for name, content in named}


def _known(what: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        raise UserError(f"unknown {what} '{name}': choose one of {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    """Each name once, in their order."""
    return ", ".join(dict.fromkeys(names))
