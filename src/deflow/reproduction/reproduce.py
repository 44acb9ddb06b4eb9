"""`reproduce.py`: the runs of a published table, and what they come to beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deflow.benchmark import random_stream
from deflow.build import build_agent
from deflow.command_line import OF_THE_USER, one_line
from deflow.config import CONFIG_DIR, plain
from deflow.cores import usable_cores
from deflow.errors import UserError
from deflow.files import locked, replacing
from deflow.report import LAST_EVALUATIONS
from deflow.reproduction.cluster import Cluster
from deflow.reproduction.layout import layout
from deflow.reproduction.page import is_possible, page
from deflow.reproduction.plan import (
    Job,
    argument,
    commands,
    name_of,
    plan,
    refuse_other_configuration,
    refuse_other_settings,
)
from deflow.reproduction.plots import draw_curves, draw_improvement, draw_profile
from deflow.reproduction.results import Result, read_results, refuse_mixture, result_of, versions_of_code, write_results
from deflow.reproduction.runs import generate_missing, run_all
from deflow.reproduction.table import Cell, cells_of, compare, latex, markdown, poolable, summary
from deflow.reproduction.tracking import track
from deflow.resuming import saved_progress
from deflow.run import of_learning
from deflow.run_folder import CONFIG_FILE
from deflow.settings import check_settings
from deflow.signals import Stopped
from deflow.stored import load_config
from deflow.timing import seconds_of_updates
from deflow.types import Spec

log = logging.getLogger(__name__)

TYPICAL = Spec(observation_dim=29, action_dim=8)  # of a task, for an estimate of time
PLAN_WIDTH = 100  # columns
ENVIRONMENTS = "eval.num_envs"
TIMED = 3  # updates, after as many that warm up


def reproduce(config: DictConfig) -> list[Result]:
    """Do the runs of a table that are missing, and write the table; or compare two files of results.

    Writes `TABLE.jsonl`, `.md`, `.tex`, `.html` and pictures into `config.out`, and the table into MLflow, also of the
    runs that are done when others have failed, or the command is stopped by a signal.

    Returns:
        The results of the table, or nothing after a dry run or a comparison.

    Raises:
        UserError: for a table, row or agent that there is not, results of two protocols, or if runs failed, after all.
    """
    if config.compare is not None:
        print(_compared(config.compare))
        return []
    if config.table is None:
        raise UserError("name a table to make, such as table=quick, or two results files, compare=[A.jsonl,B.jsonl]")
    table = layout(config.table)
    logs, data = Path(config.paths.logs).absolute() / "reproduce", Path(config.paths.data).expanduser().absolute()
    chosen = config.rows, config.tasks, config.agents
    jobs = plan(
        table, logs, data, config.seeds or table.seeds, *chosen, settings=list(_arguments(plain(config.settings)))
    )
    refuse_other_settings(jobs)
    first: dict[tuple[str, str], DictConfig] = {}
    for job in jobs:
        if (job.row, job.agent) not in first:  # a mistake in the settings is every run's
            first[job.row, job.agent] = _checked(job)
    _refuse_other_configurations(jobs)
    threads, on_gpu = config.threads, all(run.trainer.accelerator != "cpu" for run in first.values())
    at_once = config.jobs or (1 if on_gpu else max(1, usable_cores() // threads))
    if config.engine.cluster is None:
        jobs = [_sharing_cores(job, at_once) for job in jobs]
    _show_plan(jobs, first, at_once, threads, on_gpu)
    if config.dry:
        print("\n".join(commands(jobs, threads)))
        return []
    refuse_mixture(_done(jobs)[0])
    run = _runner(config.engine, logs, at_once, threads)
    generate_missing(jobs)
    return _make(table.name, jobs, run, config)


def _make(
    table: str, jobs: Sequence[Job], run: Callable[[Sequence[Job]], list[str]], config: DictConfig
) -> list[Result]:
    """Do the runs and write the table of what is done then; whatever went wrong is said after that."""
    said, stopped = [], None
    try:
        said = run(jobs)
    except Stopped as signal:
        stopped = signal
    results, damaged = _done(jobs)
    said += damaged
    try:
        if results:
            refuse_mixture(results)
            cells, files = _write(table, results, Path(config.out))
            if config.mlflow is not None:
                track(config.mlflow, table, cells, results, files)
    except (UserError, OSError) as error:
        said.append(str(error))
    if stopped is not None:
        stopped.advice = "; ".join([*said, "go on by the same command"])
        raise stopped
    if said:
        lacking = len(jobs) - len(results)
        start = f"the table lacks {lacking} of {len(jobs)} runs, go on by the same command: " if lacking else ""
        raise UserError(start + "; ".join(said))
    return results


def _refuse_other_configurations(jobs: Sequence[Job]) -> None:
    """Every run that was begun is what its cell's settings come to now."""
    cells: dict[tuple[str, int | None, str], DictConfig] = {}
    for job in jobs:
        if job.state == "missing":
            continue
        key = job.row, job.task, job.agent
        if key not in cells:
            cells[key] = _composed(job.settings)
        cells[key].seed = job.seed
        refuse_other_configuration(job, plain(load_config(job.folder / CONFIG_FILE)), plain(cells[key]))


def _sharing_cores(job: Job, at_once: int) -> Job:
    """With as many environments as let runs side by side have about those of one alone; it measures the same."""
    if at_once == 1 or ENVIRONMENTS in map(name_of, job.settings):
        return job
    return replace(job, settings=(*job.settings, f"{ENVIRONMENTS}={-(-usable_cores() // at_once) + 1}"))


def _runner(engine: DictConfig, logs: Path, at_once: int, threads: int) -> Callable[[Sequence[Job]], list[str]]:
    """What does the runs that are not done, and returns what is to be said of those that are not done then."""
    if engine.cluster is None:
        return lambda jobs: run_all(jobs, at_once, threads)
    return Cluster(logs / ".jobs", at_once, threads, engine.cluster, plain(engine.submit), engine.max_timeouts).run_all


def _done(jobs: Sequence[Job]) -> tuple[list[Result], list[str]]:
    """The results of the runs that are done, and what is wrong with those that cannot be read."""
    results, damaged = [], []
    for job in jobs:
        if job.state == "done":
            try:
                results.append(result_of(job))
            except UserError as error:
                damaged.append(str(error))
    return results, damaged


def _arguments(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Arguments of `train.py` from what the command line says under `settings`."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _arguments(value, f"{prefix}{key}.")
        else:
            name = f"{prefix}{key}"
            is_text = isinstance(value, str)
            yield argument(name, value) if is_text else f"{name}={json.dumps(value, separators=(',', ':'))}"


def _compared(paths: Sequence[str]) -> str:
    if len(paths) != 2:
        raise UserError("compare=[A.jsonl,B.jsonl] takes two results files")
    first, second = (read_results(Path(path)) for path in paths)
    return compare(first, second)


def _write(table: str, results: Sequence[Result], folder: Path) -> tuple[list[Cell], list[Path]]:
    """Everything that can be said of the results, into files; they are returned, and the table's cells.

    What an earlier selection has left and this one has not is removed; of two commands one waits for the other.
    """
    with locked(folder / f".{table}.lock", f"the table in {folder}"):
        return _write_alone(table, results, folder)


def _write_alone(table: str, results: Sequence[Result], folder: Path) -> tuple[list[Cell], list[Path]]:
    write_results(folder / f"{table}.jsonl", results)  # first, whatever else goes wrong
    cells = cells_of(table, results)
    of_all = summary(results)
    versions = versions_of_code(results)
    text = markdown(table, cells) + ("\nOver all tasks that every agent has:\n\n" + of_all if of_all else "")
    text += f"\n{versions}\n" if versions else ""
    written = {f"{table}.md": text, f"{table}.tex": latex(cells) + (f"% {versions}\n" if versions else "")}
    if is_possible():
        written[f"{table}.html"] = page(table, cells, results, folder)
    else:
        log.info("no %s.html: that needs the package plotly (pip install plotly)", table)
    for name, content in written.items():
        with replacing(folder / name) as part:
            part.write_text(content)
    pictures = {"curves": draw_curves}
    if poolable(results):
        pictures |= {"profile": draw_profile, "improvement": draw_improvement}
    for name, draw in pictures.items():
        draw(results, folder / f"{table}_{name}.png")
    print(text)
    names = (*written, *(f"{table}_{name}.png" for name in pictures), f"{table}.jsonl")
    for name in (f"{table}.html", f"{table}_profile.png", f"{table}_improvement.png"):
        if name not in names:
            (folder / name).unlink(missing_ok=True)
    log.info("%s are in %s", ", ".join(names), folder)
    return cells, [folder / name for name in names]


def _show_plan(
    jobs: Sequence[Job], first: Mapping[tuple[str, str], DictConfig], at_once: int, threads: int, on_gpu: bool
) -> None:
    """How many runs there are, how far they are, and how long those take that are missing.

    Args:
        jobs: of the plan.
        first: row and agent -> the configuration of one of its runs.
        at_once: runs side by side.
        threads: of torch, in each.
        on_gpu: whether the runs are, whose time is not estimated.
    """
    table = Table(title=f"{len(jobs)} runs, {at_once} at a time with {threads} threads each")
    for column in ("row", "agent", "done", "begun", "missing", "updates of a run", "hours left, about"):
        table.add_column(column)
    speeds: dict[tuple[str, str], dict[str, float]] = {}  # of an agent with these networks, whatever the task
    total = longest = 0.0
    for row, agent in dict.fromkeys((job.row, job.agent) for job in jobs):
        of_cell = [job for job in jobs if (job.row, job.agent) == (row, agent)]
        states = [job.state for job in of_cell]
        left = len(states) - states.count("done")
        updates, hours = "", 0.0
        if left:
            job_config = first[row, agent]
            steps = sum(stage.steps for stage in job_config.stages.values())
            updates = f"{steps:,}"
            if not on_gpu and job_config.task.get("frames") is None:  # an update of images takes seconds
                key = agent, str((job_config.networks, job_config.data.batch_size, job_config.stages))
                if key not in speeds:
                    speeds[key] = _seconds(job_config, threads)
                hours_of_runs = [
                    _seconds_left(job_config, updates_of(job, job_config), speeds[key]) / 3600
                    for job in of_cell
                    if job.state != "done"
                ]
                hours, longest = sum(hours_of_runs), max(longest, *hours_of_runs)
        total += hours
        counts = [str(states.count(state)) for state in ("done", "begun", "missing")]
        table.add_row(escape(row), escape(agent), *counts, updates, f"{hours:.1f}" if hours else "")
    if total:
        hours = max(longest, total / at_once)
        excepted = "evaluations, environments, data and images excepted"
        table.caption = f"about {hours:.1f} hours by timing {TIMED} updates of each stage here, {excepted}"
    console = Console(stderr=True)
    console.width = max(console.width, PLAN_WIDTH)
    console.print(table)


def updates_of(job: Job, config: DictConfig) -> int:
    """How far a run is that was begun; what cannot be read is said when it is its turn."""
    try:
        return saved_progress(config, job.folder).updates
    except UserError:
        return 0


def _seconds_left(config: DictConfig, done: int, speeds: Mapping[str, float]) -> float:
    """Of the updates that a run lacks, after so many, by the seconds of one of each stage."""
    seconds, before = 0.0, 0
    for name, stage in config.stages.items():
        seconds += speeds[name] * min(stage.steps, max(0, before + stage.steps - done))
        before += stage.steps
    return seconds


def _seconds(config: DictConfig, threads: int) -> dict[str, float]:
    """Of an update of each stage, timed here on random data."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agent, found = build_agent(config.agent, TYPICAL), {}
        for name, stage in config.stages.items():
            learning = of_learning(stage) | {"cosine_decay_steps": None}  # which takes no time, and a Trainer
            agent.begin_stage(name, first_step=0, **learning)
            proposals = stage.get("proposals") if agent.cached_flow is not None else None
            stream = random_stream(agent, config.data.batch_size, TIMED, (0, "timed"), proposals)
            found[name] = [seconds_of_updates(agent, stream) for _ in range(2)][-1] / TIMED
        return found
    finally:
        torch.set_num_threads(before)


def _checked(job: Job) -> DictConfig:
    """The configuration of a run, with all that can be said against it before it begins."""
    try:
        config = _composed(job.settings)
        check_settings(config, "train")
        source = instantiate(config.data.source)
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from error
    if not source.has_env:
        raise UserError(f"{job.name}: its data have no environment, and a table needs evaluations: set data.source.env")
    _check_evaluations(job, config)
    return config


def _check_evaluations(job: Job, config: DictConfig) -> None:
    """Whether the last stage has the evaluations that the table shows."""
    name, stage = list(config.stages.items())[-1]
    made = -(-stage.steps // config.eval.every) if stage.get("evaluate", True) else 0
    needed = LAST_EVALUATIONS if job.value == "mean_of_last_three" else 1
    if made < needed:
        raise UserError(
            f"{job.name}: the table shows its {job.value.replace('_', ' ')}, and its last stage, '{name}', of "
            f"{stage.steps} updates has {made} evaluations: set eval.every lower"
        )
    if job.value == "before_and_after" and stage.get("environment") is None:
        raise UserError(
            f"{job.name}: the table shows before and after what is learnt online, and its last stage, '{name}', plays "
            "in no environment: take stages=offline_to_online"
        )


def _composed(overrides: Sequence[str]) -> DictConfig:
    try:
        if GlobalHydra.instance().is_initialized():
            return compose("train", overrides=list(overrides))
        with initialize_config_dir(CONFIG_DIR, version_base=None):
            return compose("train", overrides=list(overrides))
    except OF_THE_USER as error:
        raise UserError(one_line(error, "train", overrides)) from error
