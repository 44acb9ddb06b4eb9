"""Where metrics go: always `metrics.csv` in the run's folder, and a tracker beside it."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests
from filelock import FileLock
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from deflow.distributed import is_main_process
from deflow.errors import UserError
from deflow.files import replacing
from deflow.imports import quick_imports

Row = dict[str, float]

SERVER_TIMEOUT_SECONDS = 5


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
    """The rows of a `metrics.csv`, without empty cells; a last row cut by a kill is left out."""
    rows = []
    with path.open(newline="") as file:
        for cells in csv.DictReader(file):
            if None in cells.values():
                continue
            rows.append({key: float(cell) for key, cell in cells.items() if cell != ""})
    return [row for row in rows if "step" in row]


def mlflow_logger(tracking_uri: str, experiment: str, run_dir: str) -> MLFlowLogger:
    """An MLflow logger whose run is remembered in `run_dir/mlflow_run_id`, so that resuming goes on with it.

    Args:
        tracking_uri: `sqlite:///...` (made if missing) or `http(s)://...` of a running server.
        experiment: MLflow's experiment.
        run_dir: the run's folder.

    Raises:
        UserError: if a server does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if tracking_uri.startswith("http"):
        _check_server(tracking_uri)
        _create_experiment(tracking_uri, experiment, artifacts=None)
    else:
        path = _database_path(tracking_uri)
        with FileLock(f"{path}.lock"):  # two processes that create the tables at once would both fail
            _create_experiment(tracking_uri, experiment, (path.parent / "mlartifacts").as_uri())
    remembered = Path(run_dir) / "mlflow_run_id"
    run_id = remembered.read_text() if remembered.exists() else None
    logger = MLFlowLogger(
        experiment_name=experiment,
        run_name=Path(run_dir).name,
        tracking_uri=tracking_uri,
        run_id=run_id,
    )
    if is_main_process():
        remembered.write_text(str(logger.run_id))
    return logger


def csv_only(run_dir: str) -> None:
    """No tracker beside `metrics.csv`."""


def tensorboard_logger(run_dir: str) -> TensorBoardLogger:
    """TensorBoard event files in the run's folder."""
    _require("tensorboard", "tensorboard")
    return TensorBoardLogger(run_dir, name="tensorboard", version="")


def wandb_logger(project: str, run_dir: str) -> WandbLogger:
    """Weights & Biases, online or offline as its own settings say."""
    _require("wandb", "wandb")
    return WandbLogger(project=project, save_dir=run_dir, name=Path(run_dir).name)


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
    path = Path(re.sub(r"^sqlite:/{3}", "", uri)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _create_experiment(uri: str, name: str, artifacts: str | None) -> None:
    for name_of_logger in ("mlflow.store.db.utils", "alembic"):  # a line a table
        logging.getLogger(name_of_logger).setLevel(logging.WARNING)
    with quick_imports():
        from mlflow.tracking import MlflowClient  # not for other trackers

        client = MlflowClient(uri)  # imports what its data base needs
    if client.get_experiment_by_name(name) is None:
        client.create_experiment(name, artifact_location=artifacts)
