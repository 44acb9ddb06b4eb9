"""Plan: which runs make a table, where each lies, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from deflow.errors import UserError
from deflow.report import read_summary
from deflow.reproduction import published
from deflow.run_folder import CONFIG_FILE, SUMMARY_FILE

QUICK = "quick"
ONLINE = "offline_to_online"
QUICK_AGENTS = ("bc", "iql", "rebrac", "fql", "deflow")
QUICK_TASKS = {"cube-single": None, "scene": 1}  # OGBench's default for cube-single; scene's is too hard for few data
EPISODES = 200  # of the data that QUICK generates
STAGES = {
    ("srpo", False): "srpo",
    ("rlpd", True): "from_scratch",
}  # (agent, whether online) -> stages; else joint, or offline_to_online

# Settings that say how a run is made, not what it is.
TECHNICAL = (
    *("trainer", "compile", "threads", "logger", "paths", "data.device", "data.source.path", "matmul_precision"),
    *("checkpoint_every", "validate_every", "eval.num_envs", "video", "diversity"),
)

OF_THE_PLAN = ("seed", "seeds", "agent", "task", "task_id", "stages", "experiment", "resume", "ckpt")

State = Literal["done", "begun", "missing"]


class Dataset(NamedTuple):
    """Data that a run needs and that are generated first."""

    name: str
    path: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `generate.py`."""
        return f"dataset={self.name}", f"out={self.path.parent}", f"episodes={EPISODES}", "seed=0"


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes:
        row: the environment, as `published` names it.
        task: of OGBench; None where a row is one task.
        agent: a choice of the group agent.
        seed: of the run.
        folder: of the run.
        settings: arguments of `train.py`, those of the folder excepted.
        changed: those of them by which the user departs from the table's protocol.
        dataset: what is generated first, if it is not there.
    """

    row: str
    task: int | None
    agent: str
    seed: int
    folder: Path
    settings: tuple[str, ...]
    changed: tuple[str, ...] = ()
    dataset: Dataset | None = None

    @property
    def state(self) -> State:
        """How far it is."""
        if read_summary(self.folder / SUMMARY_FILE) is not None:
            return "done"
        return "begun" if (self.folder / CONFIG_FILE).exists() else "missing"

    def arguments(self, threads: int) -> tuple[str, ...]:
        """Of `train.py`: those that begin the run, with so many threads of torch, or that go on with it."""
        if self.state == "begun":
            return (f"resume={self.folder}",)
        return (*self.settings, f"hydra.run.dir={self.folder}", f"threads={threads}")

    @property
    def made_by(self) -> Path:
        """The file beside the folder that holds the settings with which the run was begun."""
        return self.folder.with_suffix(".settings")

    @property
    def name(self) -> str:
        """As messages call it."""
        task = "" if self.task is None else f" task {self.task}"
        return f"{self.agent} on {self.row}{task}, seed {self.seed}"


def names() -> list[str]:
    """Of the tables that can be made."""
    return [*(table for table in published.tables() if not table.startswith("optiflow")), QUICK]


def plan(
    table: str,
    logs: Path,
    data: Path,
    seeds: int,
    rows: Sequence[str] | None = None,
    tasks: Sequence[int] | None = None,
    agents: Sequence[str] | None = None,
    settings: Sequence[str] = (),
) -> list[Job]:
    """The runs of a table, all agents and tasks of a seed before those of the next, so that it fills up evenly.

    Args:
        table: one of `names`.
        logs: folder under which the runs' folders lie.
        data: folder for data that are generated.
        seeds: runs of each cell, from seed 0 on.
        rows: some of the table's rows; None: all.
        tasks: some of OGBench's tasks 1 to 5; None: all that the table has.
        agents: some of its agents; None: all.
        settings: further arguments of `train.py`, for every run.

    Raises:
        UserError: for a name that is not in the table, listing the right ones.
    """
    _refuse_unknown("table", [table], names())
    known = _rows(table)
    _refuse_unknown(f"row of {table}", rows or (), known)
    columns = QUICK_AGENTS if table == QUICK else tuple(dict.fromkeys(c.agent for c in published.published(table)))
    _refuse_unknown(f"agent of {table}", agents or (), columns)
    if [] in (rows, agents, tasks):
        raise UserError("an empty list chooses nothing: leave out rows, agents or tasks for all of them")
    chosen = {row: known[row] for row in rows or known}
    if tasks is not None:
        for row, of_row in chosen.items():
            _refuse_unknown(f"task of {row} in {table}", list(map(str, tasks)), list(map(str, of_row)))
        chosen = {row: list(dict.fromkeys(tasks)) for row in chosen}
    for name in (setting.lstrip("+").partition("=")[0] for setting in settings):
        if name in OF_THE_PLAN or name.startswith("hydra."):
            raise UserError(f"{name} is the table's to set: choose rows, tasks, agents and seeds")
    return [
        _job(table, row, task, agent, seed, logs, data, settings)
        for seed in range(seeds)
        for row, of_row in chosen.items()
        for task in of_row
        for agent in dict.fromkeys(agents or columns)
    ]


def refuse_other_settings(jobs: Sequence[Job]) -> None:
    """A run that was begun with other settings is not a run of this plan.

    Raises:
        UserError: naming the run, and its settings.
    """
    for job in jobs:
        if job.state == "missing" or not job.made_by.exists():
            continue
        before, now = job.made_by.read_text().split("\n"), list(job.settings)
        differing = [setting for setting in (*before, *now) if (setting in before) != (setting in now)]
        if differing:
            raise UserError(
                f"{job.folder} was begun with other settings ({' '.join(differing)}): go on with its own, or choose "
                "another paths.logs"
            )


def _rows(table: str) -> dict[str, list[int | None]]:
    """Row -> its tasks."""
    if table == QUICK:
        return {row: [task] for row, task in QUICK_TASKS.items()}
    found: dict[str, list[int | None]] = {}
    for cell in published.published(table):
        if cell.row != published.AVERAGE:
            found.setdefault(cell.row, [])
            if cell.task not in found[cell.row]:
                found[cell.row].append(cell.task)
    # A row with tasks of its own has their mean beside them, which is no run.
    return {row: [task for task in of_row if task is not None] or of_row for row, of_row in found.items()}


def _job(
    table: str, row: str, task: int | None, agent: str, seed: int, logs: Path, data: Path, settings: Sequence[str]
) -> Job:
    online = table == ONLINE
    stages = STAGES.get((agent, online), ONLINE if online else "joint")
    chosen = [f"agent={agent}", f"stages={stages}", f"seed={seed}", "logger=csv", *settings]
    place = logs / table / (row if task is None else f"{row}-task{task}") / agent / f"seed_{seed}"
    changed = tuple(sorted(s for s in settings if not s.lstrip("+").startswith(TECHNICAL)))
    if table != QUICK:
        return Job(row, task, agent, seed, place, (*published.overrides(table, row, task), *chosen), changed)
    dataset = Dataset(f"{row}-play-v0", data / f"{row}-play-v0.npz")
    experiment = ["experiment=original_comparison", f"task={row.replace('-', '_')}", f"task_id={task or 'null'}"]
    from_data = f"data.source.path={dataset.path}"
    return Job(row, task, agent, seed, place, (*experiment, from_data, *chosen), changed, dataset)


def _refuse_unknown(what: str, chosen: Sequence[str], known: Iterable[str]) -> None:
    for name in chosen:
        if name not in known:
            raise UserError(f"unknown {what} '{name}': choose among {', '.join(known)}")


def commands(jobs: Sequence[Job], threads: int) -> Iterator[str]:
    """What would be typed, in a shell, to do what is not done."""
    for dataset in missing_datasets(jobs):
        yield shlex.join(("python", "generate.py", *dataset.arguments))
    for job in jobs:
        if job.state != "done":
            yield shlex.join(("python", "train.py", *job.arguments(threads)))


def missing_datasets(jobs: Sequence[Job]) -> list[Dataset]:
    """The data that the runs need and that are not there."""
    needed = dict.fromkeys(job.dataset for job in jobs if job.state == "missing")
    return [dataset for dataset in needed if dataset is not None and not dataset.path.exists()]
