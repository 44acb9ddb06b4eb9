"""Where MLflow keeps its runs, a data base or a server: there, whole and fit to be written to before a run begins."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import requests

from deflow.errors import UserError
from deflow.files import locked

SERVER_TIMEOUT_SECONDS = 5

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is away would be asked for minutes; whoever asks tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Setting(NamedTuple):
    """What of the command line names the store, for messages."""

    name: str
    instead: str  # what to do where no store is to be had
    experiment: str | None = None  # the setting that chooses an experiment, if there is one


OF_LOGGER = Setting("logger.tracking_uri", "use logger=csv", "logger.experiment")


def calm_mlflow() -> None:
    """Before MLflow is imported: let it neither call home, nor wait for minutes, nor say more than an error's line."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # A line a table, and the traceback of whatever the tracker reports in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def have_experiment(uri: str, experiment: str, setting: Setting = OF_LOGGER) -> None:
    """See to it that a run of `experiment` can begin at `uri`; a data base that is missing is made.

    Raises:
        UserError: if a server does not answer, the data base is locked, damaged or of another version of MLflow, or the
            experiment has been deleted.
    """
    if uri.startswith("http"):
        _check_server(uri, setting)
        _have_experiment(uri, experiment, None, setting)
        return
    path = _database_path(uri, setting)
    with locked(Path(f"{path}.lock"), "MLflow's data base"):  # two processes that make it at once would both fail
        _make_database(path)
        _check_database(path, uri, setting)
        _have_experiment(uri, experiment, (path.parent / "mlartifacts").as_uri(), setting)


def check_store(uri: str, setting: Setting) -> None:
    """Whether something can be read at `uri`; nothing is made.

    Raises:
        UserError: if a server does not answer, or the data base is missing, locked, damaged or of another version.
    """
    if uri.startswith("http"):
        _check_server(uri, setting)
        return
    path = _database_path(uri, setting)
    if not path.is_file():
        raise UserError(f"no data base of MLflow's at {path}: correct {setting.name}, or {setting.instead}")
    _check_database(path, uri, setting)


def _check_server(uri: str, setting: Setting) -> None:
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT_SECONDS).raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"no MLflow server answers at {uri}: start one (make ui), correct {setting.name} or {setting.instead}"
        ) from error


def _database_path(uri: str, setting: Setting) -> Path:
    if urlparse(uri).scheme != "sqlite":
        raise UserError(f"{setting.name} must start with sqlite:/// or http, got {uri}")
    return Path(re.sub(r"^sqlite:/{3}", "", uri)).absolute()


def _make_database(path: Path) -> None:
    """Make it aside, tables and all, and rename it: a kill leaves a whole data base or none."""
    if path.exists() and path.stat().st_size:
        return
    from mlflow.tracking import MlflowClient

    prefix = f".part-{path.name}-"
    for left_by_a_kill in path.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    # Under a new name each time: MLflow keeps the connections to all that it has opened.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        part = Path(folder) / path.name
        MlflowClient(f"sqlite:///{part}").search_experiments(max_results=1)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


def _check_database(path: Path, uri: str, setting: Setting) -> None:
    """Whether it can be written to and is of the installed MLflow, which itself would try for minutes, or change it."""
    instead = f"or {setting.instead}"
    try:
        with closing(sqlite3.connect(path, SERVER_TIMEOUT_SECONDS, isolation_level=None)) as base:
            base.execute("BEGIN IMMEDIATE")
            base.execute("ROLLBACK")
            versions = base.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            raise UserError(f"{path} is no data base of MLflow's, or half of one: move it away, {instead}") from error
        raise UserError(f"{path} cannot be written to ({error}): end or wait for who holds it, {instead}") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is no whole data base ({error}): move it away, {instead}") from error
    if [version for (version,) in versions] != [_schema_version()]:
        raise UserError(f"{path} is of another version of MLflow: run 'mlflow db upgrade {uri}' on a copy, {instead}")


def _schema_version() -> str | None:
    """The schema's version in data bases that the installed MLflow makes."""
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations")).get_current_head()


def _have_experiment(uri: str, name: str, artifacts: str | None, setting: Setting) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        client.create_experiment(name, artifact_location=artifacts)
    elif found.lifecycle_stage == "deleted":
        another = f"choose another, {setting.experiment}=NAME, or " if setting.experiment else ""
        raise UserError(
            f"MLflow's experiment '{name}' has been deleted: {another}bring it back, "
            f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {found.experiment_id}"
        )
