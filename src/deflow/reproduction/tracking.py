"""A table in MLflow: a run for the table, and one inside it for each of its runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deflow.errors import UserError
from deflow.imports import quick_imports
from deflow.mlflow_run import PARENT_TAG
from deflow.mlflow_store import Setting, calm_mlflow, have_experiment
from deflow.reproduction.results import Result
from deflow.reproduction.table import Cell, task_name

EXPERIMENT = "reproduce"
SETTING = Setting("mlflow", "leave it out by mlflow=null")


def track(uri: str, table: str, cells: Sequence[Cell], results: Sequence[Result], files: Iterable[Path]) -> str:
    """Log a table once more: its run is found again by where its files lie, as are the runs in it.

    Args:
        uri: `sqlite:///...`, made if missing, or `http(s)://...` of a running server.
        table: its name.
        cells: each mean becomes a metric of the table's run.
        results: each becomes a run, with its learning curve.
        files: kept with the table's run; they lie in one folder.

    Returns:
        The id of the table's run.

    Raises:
        UserError: if MLflow cannot be written to.
    """
    calm_mlflow()
    with quick_imports():
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
        from sqlalchemy.exc import SQLAlchemyError
    have_experiment(uri, EXPERIMENT, SETTING)
    try:
        return _track(MlflowClient(uri), table, cells, results, list(files))
    except (MlflowException, SQLAlchemyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"MLflow at {uri} fails ({reason}): mend it, or leave it out by mlflow=null") from error


def _track(client: Any, table: str, cells: Sequence[Cell], results: Sequence[Result], files: Sequence[Path]) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    tags = {"table": table, "folder": str(files[0].parent.absolute())}
    whole = _run(client, experiment, table, tags)
    for cell in cells:
        _log(client, whole, {f"{task_name(cell.row, cell.task)}/{cell.agent}": {len(results): cell.mean}})
    for path in files:
        client.log_artifact(whole, str(path))
    for result in results:
        name = f"{result.agent} seed {result.seed} {task_name(result.row, result.task)}"
        run = _run(client, experiment, name, {PARENT_TAG: whole, "folder": result.folder})
        facts = {"row": result.row, "task": result.task, "agent": result.agent, "seed": result.seed}
        for key, value in (facts | result.identity | {"command": result.command, "commit": result.commit}).items():
            client.set_tag(run, key, str(value))
        once = {"value": {0: result.value}, "updates_per_second": {0: result.updates_per_second}}
        _log(client, run, once | {"evaluation": result.curve})
    return whole


def _run(client: Any, experiment: str, name: str, tags: dict[str, str]) -> str:
    """The run that has these tags; made if there is none."""
    quoted = ((key, f'"{value}"' if "'" in value else f"'{value}'") for key, value in tags.items())
    found = client.search_runs([experiment], " and ".join(f"tags.`{key}` = {value}" for key, value in quoted))
    if found:
        return str(found[0].info.run_id)
    made = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.set_terminated(made)
    return str(made)


def _log(client: Any, run: str, metrics: dict[str, dict[int, float]]) -> None:
    """Metric -> step -> value; what is there already is not logged again."""
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    known = client.get_run(run).data.metrics
    for name, values in ((_metric_name(name), values) for name, values in metrics.items()):
        there = {(m.step, m.value) for m in client.get_metric_history(run, name)} if name in known else set()
        new = [Metric(name, value, now, step) for step, value in values.items() if (step, value) not in there]
        client.log_batch(run, new)


def _metric_name(name: str) -> str:
    """A metric's name with the characters that MLflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)
