"""Plan: which runs make a table, where each lies, and the command that makes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deflow.command_line import quoted
from deflow.data.generate.runner import generated_path
from deflow.errors import UserError
from deflow.reproduction.layout import Generated, Layout, Value, place_of
from deflow.run_folder import CONFIG_FILE, SUMMARY_FILE, read_summary
from deflow.sections import AUTO

# Settings that say how a run is made, not what it is.
TECHNICAL = (
    *(
        "trainer",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.strategy",
        "trainer.one_launch",
    ),
    *("trainer.log_every_n_steps", "compile", "threads", "matmul_precision", "data.device", "data.source.dir"),
    *("logger", "paths", "checkpoint_every", "validate_every", "eval.num_envs", "video", "diversity"),
)
WHOLE_GROUPS = ("logger", "paths", "video", "diversity")  # of them, those all of whose settings are

# What compares a run's configuration with the plan's.
DATA_FILE = "data.source.path"
PATHS = (DATA_FILE, "ckpt")  # which a run makes absolute
DECIDED = "iav.result"  # by the data; and so is whatever the plan leaves at `auto`
HOW_TO_BUILD = ("_partial_", "_convert_", "_recursive_")
SAME_AS = {"torch.optim.Adam": "deflow.agents.optimizer.PartwiseAdam"}  # older configurations' name -> ours

PLAIN = re.compile(r"[A-Za-z0-9_./:@+-]*")  # text that Hydra's grammar takes as it is

OF_THE_PLAN = ("seed", "seeds", "agent", "task", "task_id", "stages", "experiment", "resume", "ckpt")

State = Literal["done", "begun", "missing"]


class Dataset(NamedTuple):
    """Data that a run needs and that are generated first."""

    name: str
    path: Path
    episodes: int
    seed: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of `generate.py` that make it."""
        out = argument("out", self.path.parent)
        return f"dataset={self.name}", out, f"episodes={self.episodes}", f"seed={self.seed}"

    @property
    def setting(self) -> str:
        """The argument of `train.py` by which a run takes these data."""
        return argument(DATA_FILE, self.path)

    def is_named_by(self, setting: str) -> bool:
        """Whether a setting names these data, wherever the folder of all data lies."""
        name, _, path = setting.partition("=")
        return name == DATA_FILE and Path(path.strip("'")).parts[-3:] == self.path.parts[-3:]


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes:
        row: the environment, as `published` names it.
        task: of OGBench; None where a row is one task.
        agent: of the group agent, or a column of a table of one's own.
        seed: of the run.
        folder: of the run.
        settings: arguments of `train.py`, those of the folder excepted.
        value: what of its evaluations the table shows.
        changed: those of the settings by which the user departs from the table's protocol.
        dataset: what is generated first, if it is not there.
    """

    row: str
    task: int | None
    agent: str
    seed: int
    folder: Path
    settings: tuple[str, ...]
    value: Value
    changed: tuple[str, ...] = ()
    dataset: Dataset | None = None

    @property
    def state(self) -> State:
        """How far it is."""
        if read_summary(self.folder / SUMMARY_FILE) is not None:
            return "done"
        return "begun" if (self.folder / CONFIG_FILE).exists() else "missing"

    def arguments(self, threads: int) -> tuple[str, ...]:
        """Arguments of `train.py` that begin the run, with so many threads of torch, or that go on with it."""
        if self.state == "begun":
            return (argument("resume", self.folder),)
        return (*self.settings, argument("hydra.run.dir", self.folder), f"threads={threads}")

    @property
    def made_by(self) -> Path:
        """The file beside the folder that holds the settings with which the run was begun."""
        return self.folder.with_suffix(".settings")

    @property
    def begun_with(self) -> tuple[str, ...]:
        """The settings with which the run was begun; those of the plan if that is not known."""
        return tuple(self.made_by.read_text().split("\n")) if self.made_by.exists() else self.settings

    @property
    def output(self) -> Path:
        """The file beside the folder that holds what the run prints."""
        return self.folder.with_suffix(".log")

    @property
    def name(self) -> str:
        """What messages call it."""
        task = "" if self.task is None else f" task {self.task}"
        return f"{self.agent} on {self.row}{task}, seed {self.seed}"


def plan(
    table: Layout,
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
        table: its layout.
        logs: folder under which the runs' folders lie.
        data: folder for data that are generated.
        seeds: runs of each cell, from seed 0 on.
        rows: some of the table's rows; None: all.
        tasks: some of OGBench's tasks 1 to 5; None: all that the table has.
        agents: some of its columns; None: all.
        settings: further arguments of `train.py`, for every run.

    Raises:
        UserError: for a name that is not in the table, listing the right ones.
    """
    _refuse_unknown(f"row of {table.name}", rows or (), table.rows)
    agents = None if agents is None else [str(agent) for agent in agents]  # a column may be called 1
    _refuse_unknown(f"agent of {table.name}", agents or (), table.columns)
    if [] in (rows, agents, tasks):
        raise UserError("an empty list chooses nothing: leave out rows, agents or tasks for all of them")
    for row in rows or table.rows if tasks else ():
        if table.rows[row] == [None]:
            raise UserError(f"{row} is one task in {table.name}: leave out tasks")
        _refuse_unknown(f"task of {row} in {table.name}", list(map(str, tasks or ())), list(map(str, table.rows[row])))
    for name in map(name_of, settings):
        if name in OF_THE_PLAN or name.startswith("hydra."):
            raise UserError(f"{name} is the table's to set: choose rows, tasks, agents and seeds")
    return [
        _job(table, row, task, agent, seed, logs, data, settings)
        for seed in range(seeds)
        for row in dict.fromkeys(rows or table.rows)
        for task in dict.fromkeys(tasks or table.rows[row])
        for agent in dict.fromkeys(agents or table.columns)
    ]


def refuse_other_settings(jobs: Sequence[Job]) -> None:
    """A run that was begun with other settings is not a run of this plan, unless they are technical.

    Raises:
        UserError: naming the run, and its settings.
    """
    for job in jobs:
        if job.state == "missing":
            continue
        before, now = (list(_deciding(settings, job.dataset)) for settings in (job.begun_with, job.settings))
        _refuse(job, [setting for setting in (*before, *now) if (setting in before) != (setting in now)])


def refuse_other_configuration(job: Job, saved: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """As `refuse_other_settings`, by what the settings came to: defaults and tuned values change as the code does.

    What only the plan has is an option of newer code, unless the plan's own settings name it; what only the run has is
    another setting, unless the data decided it.

    Args:
        job: the run.
        saved: its resolved configuration, in which the data may have decided what was left to them.
        planned: what the plan's settings resolve to.
    """
    before, now = _leaves(saved), _leaves(planned)
    asked = {name_of(setting) for setting in job.settings}
    differing = [f"{name}={value}" for name, value in before.items() if not _is_planned(name, value, now)]
    groups = {group for name in before for group in _groups_of(name)}
    differing += [
        f"no {name}"
        for name, value in now.items()
        if name not in before
        and not is_technical(name)
        and (name in asked or name.startswith("stages."))
        and not (value == AUTO and name in groups)  # the data have decided more than one number
    ]
    named = job.dataset is not None and job.made_by.exists()  # and compared by that, wherever the data lay
    found = [setting for setting in _deciding(differing, job.dataset) if setting not in job.settings]
    _refuse(job, [setting for setting in found if not (named and name_of(setting) == DATA_FILE)])


def _is_planned(name: str, value: Any, now: Mapping[str, Any]) -> bool:
    """Whether a leaf of a run's configuration says what the plan does, or what the data had to say."""
    along = [name, *_groups_of(name)]
    if DECIDED in along or any(now.get(branch) == AUTO for branch in along):
        return True
    if name not in now:
        return False
    planned = now[name]
    if name in PATHS and planned is not None:
        return value in (planned, str(Path(planned).absolute()))
    return bool(value == planned or SAME_AS.get(str(value)) == planned)


def _groups_of(name: str) -> list[str]:
    """Dotted names of the groups that a setting is in."""
    return [name[:place] for place, letter in enumerate(name) if letter == "."]


def _leaves(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted name -> value, without what only Hydra reads."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{above}{name}.")
        elif name not in HOW_TO_BUILD:
            found[f"{above}{name}"] = value
    return found


def _refuse(job: Job, differing: Sequence[str]) -> None:
    if differing:
        raise UserError(
            f"{job.folder} was begun with other settings ({' '.join(differing)}): go on with its own, or choose "
            "another paths.logs"
        )


def _deciding(settings: Iterable[str], dataset: Dataset | None) -> Iterator[str]:
    """Those that say what a run is; that it takes these data, in the same words wherever they lie."""
    for setting in settings:
        if dataset is not None and dataset.is_named_by(setting):
            yield dataset.setting
        elif not is_technical(setting):
            yield setting


def _job(
    table: Layout, row: str, task: int | None, agent: str, seed: int, logs: Path, data: Path, settings: Sequence[str]
) -> Job:
    cell = table.cells[row, task, agent]
    place = logs / table.folder / place_of(row, task) / agent / f"seed_{seed}"
    changed = tuple(sorted(setting for setting in settings if not is_technical(setting)))
    dataset = None if cell.data is None else _dataset(cell.data, data, table.generate)
    from_data = argument("paths.data", data) if dataset is None else dataset.setting
    chosen = (*cell.settings, from_data, f"seed={seed}", "logger=csv", *settings)
    return Job(row, task, agent, seed, place, chosen, table.value, changed, dataset)


def is_technical(setting: str) -> bool:
    """Whether an argument of `train.py` says how a run is made, and not what it is."""
    name = name_of(setting)
    return name in TECHNICAL or name.partition(".")[0] in WHOLE_GROUPS


def argument(name: str, value: str | Path) -> str:
    """Of a command, quoted if Hydra would read anything but this text."""
    return f"{name}={value if PLAIN.fullmatch(str(value)) else quoted(str(value))}"


def name_of(setting: str) -> str:
    """What an argument of `train.py` sets."""
    return setting.lstrip("+").partition("=")[0]


def _dataset(name: str, folder: Path, generate: Generated | None) -> Dataset:
    assert generate is not None, "a layout with data says how they are generated"
    episodes, seed = generate["episodes"], generate["seed"]
    return Dataset(name, generated_path(folder, name, episodes, seed), episodes, seed)


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
