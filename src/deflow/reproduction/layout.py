"""Layout: the rows and columns of a table, and how the runs of each cell are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deflow.config import CONFIG_DIR
from deflow.errors import UserError
from deflow.ranges import Count, Seed, TaskId
from deflow.reproduction import published
from deflow.settings import check_value, described

ONLINE = "offline_to_online"
STAGES = {
    ("srpo", False): "srpo",
    ("rlpd", True): "from_scratch",
}  # (agent, whether online) of a published table -> stages; else joint, or offline_to_online

FOLDER = re.compile(r"\w[\w .+-]*")  # which no shell, nor Hydra, takes for something else

Value = Literal["mean_of_last_three", "last", "before_and_after"]
Key = tuple[str, int | None, str]  # row, task of OGBench or None, column


class Cell(NamedTuple):
    """How the runs of a cell are made."""

    settings: tuple[str, ...]  # arguments of `train.py`
    data: str | None = None  # a data set that is generated if it is not there


class Generated(TypedDict):
    """How much of a data set is generated, and with which seed."""

    episodes: Count
    seed: Seed


@dataclass(frozen=True)
class Layout:
    """A table without its numbers.

    Attributes:
        name: of the table.
        folder: of its runs, below `paths.logs/reproduce`.
        value: what of a run's evaluations a cell shows.
        cells: in their order.
        seeds: runs of a cell, unless another number is asked for.
        generate: of data sets that are not there.
    """

    name: str
    folder: str
    value: Value
    cells: Mapping[Key, Cell]
    seeds: int = 8
    generate: Generated | None = None

    @property
    def rows(self) -> dict[str, list[int | None]]:
        """Row -> its tasks."""
        found: dict[str, dict[int | None, None]] = {}
        for row, task, _ in self.cells:
            found.setdefault(row, {})[task] = None
        return {row: list(tasks) for row, tasks in found.items()}

    @property
    def columns(self) -> list[str]:
        """The agents, or whatever else the columns are."""
        return list(dict.fromkeys(column for _, _, column in self.cells))


class OwnRow(TypedDict):
    """A row in the file of a table of one's own."""

    settings: Sequence[str]
    task: NotRequired[TaskId]
    data: NotRequired[str]


class OwnTable(TypedDict):
    """The file of a table of one's own; what its entries mean stands in configs/tables/quick.yaml."""

    folder: str
    value: Value
    seeds: Count
    generate: NotRequired[Generated]
    every: Sequence[str]
    rows: Mapping[str, OwnRow]
    columns: Mapping[str, Sequence[str]]


def names() -> list[str]:
    """Names of the tables that come with the project."""
    again = "optiflow"  # a third party's runs of the published ones
    return [*(table for table in published.tables() if not table.startswith(again)), *sorted(_own())]


def layout(table: str) -> Layout:
    """A table's layout.

    Args:
        table: one of `names`, or the path of a YAML file like those in `configs/tables`.

    Raises:
        UserError: if there is no such table, or its file is no table.
    """
    if table.endswith(".yaml"):
        if Path(table).stem in names():
            raise UserError(f"{table}: there is a table {Path(table).stem} already, give the file another name")
        return _of_file(Path(table))
    if table in _own():
        return _of_file(_own()[table])
    if table not in names():
        raise UserError(f"unknown table '{table}': choose among {', '.join(names())}, or name a file, NAME.yaml")
    return _of_papers(table)


def place_of(row: str, task: int | None) -> str:
    """The folder of a row's runs."""
    return row if task is None else f"{row}-task{task}"


def _own() -> dict[str, Path]:
    return {path.stem: path for path in (Path(CONFIG_DIR) / "tables").glob("*.yaml")}


def _of_papers(table: str) -> Layout:
    """Every agent on every row, whether that cell is published or not."""
    cells = published.published(table)
    agents = dict.fromkeys(cell.agent for cell in cells)
    tasks: dict[str, dict[int | None, None]] = {}
    for cell in cells:
        if cell.row != published.AVERAGE:
            tasks.setdefault(cell.row, {})[cell.task] = None
    online = table == ONLINE
    return Layout(
        name=table,
        folder=table,
        value="before_and_after" if online else "last" if table.startswith("d4rl") else "mean_of_last_three",
        cells={
            (row, task, agent): Cell((*published.overrides(table, row, task), *_of_agent(agent, online)))
            for row, of_row in tasks.items()
            # A row with tasks of its own has their mean beside them, which is no run.
            for task in [task for task in of_row if task is not None] or of_row
            for agent in agents
        },
    )


def _of_agent(agent: str, online: bool) -> tuple[str, str]:
    return f"agent={agent}", f"stages={STAGES.get((agent, online), ONLINE if online else 'joint')}"


def _of_file(path: Path) -> Layout:
    file = _read(path)
    if any("data" in row for row in file["rows"].values()) and "generate" not in file:
        raise UserError(f"{path}: rows with data need generate: {{episodes: 200, seed: 0}}")
    return Layout(
        name=path.stem,
        folder=file["folder"],
        value=file["value"],
        cells={
            (str(name), row.get("task"), str(column)): Cell(
                (*file["every"], *row["settings"], *settings), row.get("data")
            )
            for name, row in file["rows"].items()
            for column, settings in file["columns"].items()
        },
        seeds=file["seeds"],
        generate=file.get("generate"),
    )


def _read(path: Path) -> OwnTable:
    if not path.is_file():
        raise UserError(f"there is no table {path}")
    try:
        file: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for setting in described(file, OwnTable):
            check_value(*setting)
    except (YAMLError, OmegaConfBaseException, OSError, UserError) as error:
        raise UserError(f"{path} is no table: {' '.join(str(error).split())}") from error
    if not file["rows"] or not file["columns"]:
        raise UserError(f"{path}: a table needs rows and columns")
    for name in (*file["rows"], *file["columns"], file["folder"]):
        if not FOLDER.fullmatch(str(name)):
            raise UserError(
                f"{path}: '{name}' becomes a folder's name: take letters, digits, spaces and _ . + -, the first a "
                "letter or digit"
            )
    places = [place_of(str(name), row.get("task")) for name, row in file["rows"].items()]
    if len(set(places)) < len(places):
        raise UserError(f"{path}: two rows have one folder, {max(places, key=places.count)}: name them otherwise")
    return file
