"""Where metrics go: always `metrics.csv` in the run's folder, and a tracker beside it."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from deflow.distributed import is_main_process
from deflow.errors import UserError
from deflow.files import locked, replacing
from deflow.imports import quick_imports
from deflow.tracking import Tracker

Row = dict[str, float]

SERVER_TIMEOUT_SECONDS = 5
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is away would be asked for minutes; whoever asks tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class CsvMetrics(Logger):
    """One row a call in `metrics.csv`; on resume the rows after the checkpoint are dropped.

    Args:
        path: of the file.
        last_step: of the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= last_step] if path.exists() else []
        self._columns = list(dict.fromkeys(key for row in self.rows for key in row)) or ["step"]
        self._rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": float(step or 0)} | {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self.rows.append(row)
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def _rewrite(self) -> None:
        with replacing(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`, without empty cells; a last row cut by a kill is left out.

    Raises:
        UserError: if the file is damaged otherwise.
    """
    rows = []
    try:
        text = path.read_bytes().decode()
        whole = text[: text.rfind("\n") + 1]  # a cut number is a number as well
        for cells in csv.DictReader(whole.splitlines()):
            row = {str(key): float(cell) for key, cell in cells.items() if cell != ""}
            if "step" not in row:
                raise ValueError("it has no step")
            rows.append(row)
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged at row {len(rows) + 1} ({error}): mend it, or move it away to go on without its rows"
        ) from error
    return rows


def mlflow_logger(tracking_uri: str, experiment: str, run_dir: str) -> Tracker:
    """An MLflow logger whose run is remembered in `run_dir/mlflow_run_id`, so that resuming goes on with it.

    Args:
        tracking_uri: `sqlite:///...` (made if missing) or `http(s)://...` of a running server.
        experiment: MLflow's experiment.
        run_dir: the run's folder.

    Raises:
        UserError: if a server does not answer, the data base is locked, damaged or of another version of MLflow, or the
            experiment or the run has been deleted.
    """
    for variable, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # A line a table, and the traceback of whatever the tracker reports in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with quick_imports():
        from mlflow.exceptions import MlflowException  # not for other trackers
        from mlflow.tracking import MlflowClient  # noqa: F401 (with all that its data base needs)
        from sqlalchemy.exc import SQLAlchemyError

    try:
        logger = _start_mlflow(tracking_uri, experiment, Path(run_dir))
    except (MlflowException, SQLAlchemyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"MLflow at {tracking_uri} fails ({reason}): mend it, or use logger=csv") from error

    def upload(path: Path) -> None:
        logger.experiment.log_artifact(logger.run_id, str(path))

    return Tracker(logger, upload, wants_system_metrics=True)


def csv_only(run_dir: str) -> None:
    """No tracker beside `metrics.csv`."""


def tensorboard_logger(run_dir: str) -> Tracker:
    """TensorBoard event files in the run's folder."""
    _require("tensorboard", "tensorboard")
    return Tracker(TensorBoardLogger(run_dir, name="tensorboard", version=""))


def wandb_logger(project: str, run_dir: str) -> Tracker:
    """Weights & Biases, online or offline as its own settings say.

    Raises:
        UserError: if it cannot start.
    """
    _require("wandb", "wandb")
    from wandb.errors import Error

    logger = WandbLogger(project=project, save_dir=run_dir, name=Path(run_dir).name)
    try:
        _ = logger.experiment  # now, so that what is wrong is said before the training
    except Error as error:
        raise UserError(f"W&B cannot start ({error}): set WANDB_MODE=offline, or use logger=csv") from error
    return Tracker(logger)


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"logger={extra} needs the package '{module}': pip install 'deflow[{extra}]'")


def _check_server(uri: str) -> None:
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT_SECONDS).raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"no MLflow server answers at {uri}: start one (make ui), correct logger.tracking_uri or use logger=csv"
        ) from error


def _database_path(uri: str) -> Path:
    if urlparse(uri).scheme != "sqlite":
        raise UserError(f"logger.tracking_uri must start with sqlite:/// or http, got {uri}")
    return Path(re.sub(r"^sqlite:/{3}", "", uri)).absolute()


def _start_mlflow(uri: str, experiment: str, run_dir: Path) -> MLFlowLogger:
    """The logger, its experiment and (in the main process) its run there and ready to be written to."""
    if uri.startswith("http"):
        _check_server(uri)
        _have_experiment(uri, experiment, artifacts=None)
    else:
        path = _database_path(uri)
        with locked(Path(f"{path}.lock"), "MLflow's data base"):  # two processes that make it at once would both fail
            _make_database(path)
            _check_database(path, uri)
            _have_experiment(uri, experiment, (path.parent / "mlartifacts").as_uri())
    remembered = run_dir / "mlflow_run_id"
    run_id = (remembered.read_text().strip() if remembered.exists() else "") or None
    logger = MLFlowLogger(experiment_name=experiment, run_name=run_dir.name, tracking_uri=uri, run_id=run_id)
    if is_main_process():
        if run_id is not None:
            _check_run(uri, run_id, remembered)
        with replacing(remembered) as part:
            part.write_text(str(logger.run_id))
    return logger


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


def _check_database(path: Path, uri: str) -> None:
    """Whether it can be written to and is of the installed MLflow, which itself would try for minutes, or change it."""
    instead = "or use logger=csv"
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
    """Of data bases that the installed MLflow makes."""
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations")).get_current_head()


def _have_experiment(uri: str, name: str, artifacts: str | None) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        client.create_experiment(name, artifact_location=artifacts)
    elif found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment '{name}' has been deleted: choose another, logger.experiment=NAME, or bring it back, "
            f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {found.experiment_id}"
        )


def _check_run(uri: str, run_id: str, remembered: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        is_there = MlflowClient(uri).get_run(run_id).info.lifecycle_stage != "deleted"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        is_there = False
    if not is_there:
        raise UserError(
            f"MLflow's run {run_id} has been deleted: remove {remembered}, and the resumed run gets a new one"
        )
