"""Where metrics go: always `metrics.csv` in the run's folder, and a tracker beside it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from imageio.v3 import imread
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from deflow.description import Description
from deflow.errors import UserError
from deflow.extras import require
from deflow.files import replacing
from deflow.imports import quick_imports
from deflow.mlflow_run import start_run
from deflow.mlflow_store import calm_mlflow
from deflow.tracking import Tracker

Row = dict[str, float]


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
    calm_mlflow()
    with quick_imports():
        from mlflow.exceptions import MlflowException  # not for other trackers
        from mlflow.tracking import MlflowClient  # noqa: F401 (with all that its data base needs)
        from sqlalchemy.exc import SQLAlchemyError

    try:
        run = start_run(tracking_uri, experiment, Path(run_dir))
    except (MlflowException, SQLAlchemyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"MLflow at {tracking_uri} fails ({reason}): mend it, or use logger=csv") from error
    return Tracker(run, run.describe, run.upload, wants_system_metrics=True)


def csv_only(run_dir: str) -> None:
    """No tracker beside `metrics.csv`."""


def tensorboard_logger(run_dir: str) -> Tracker:
    """TensorBoard event files in the run's folder; of the files that a run leaves, its pictures."""
    require("logger=tensorboard", "tensorboard")
    logger = TensorBoardLogger(run_dir, name="tensorboard", version="")

    def upload(path: Path) -> None:
        if path.suffix == ".png":
            logger.experiment.add_image(path.stem, imread(path), dataformats="HWC")
            logger.experiment.flush()

    return Tracker(logger, upload=upload)


def wandb_logger(project: str, run_dir: str) -> Tracker:
    """Weights & Biases, online or offline as its own settings say; of a run's files, its pictures and its video.

    Raises:
        UserError: if it cannot start.
    """
    require("logger=wandb", "wandb")
    import wandb
    from wandb.errors import Error

    logger = WandbLogger(project=project, save_dir=run_dir, name=Path(run_dir).name)
    try:
        _ = logger.experiment  # now, so that what is wrong is said before the training
    except Error as error:
        raise UserError(f"W&B cannot start ({error}): set WANDB_MODE=offline, or use logger=csv") from error

    def describe(description: Description) -> None:
        logger.experiment.name = description.name
        logger.log_hyperparams(description.tags | description.settings)

    def upload(path: Path) -> None:
        kind = {".png": wandb.Image, ".mp4": wandb.Video}.get(path.suffix)
        if kind is not None:
            logger.experiment.log({path.stem: kind(str(path))})

    return Tracker(logger, describe, upload)
