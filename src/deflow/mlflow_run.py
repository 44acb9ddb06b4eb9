"""A run in MLflow, and one inside it for each seed of several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger

from deflow.description import Description
from deflow.distributed import is_main_process
from deflow.errors import UserError
from deflow.files import replacing
from deflow.mlflow_store import have_experiment

PARENT_TAG, SEED_TAG = "mlflow.parentRunId", "seed"


class MLflow(MLFlowLogger):
    """Lightning's logger, to which a run also says what it is; what is measured of one seed goes to that seed's run.

    The seeds' runs are made when there is something to log, from what MLflow has of the whole run, and found again by
    their tags when it is resumed.
    """

    def describe(self, description: Description) -> None:
        """Name the run, tag it and log its settings; may be called again."""
        self.experiment.update_run(self._id, name=description.name)
        for name, value in description.tags.items():
            self.experiment.set_tag(self._id, name, value)
        self.log_hyperparams(description.settings)

    def upload(self, path: Path) -> None:
        """Keep a file with the run."""
        self.experiment.log_artifact(self._id, str(path))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            of_seed = re.fullmatch(r"(.+)/seed_(\d+)", name)
            if of_seed is not None:
                self._run_of(int(of_seed[2])).log_metrics({of_seed[1]: value}, step)
        super().log_metrics({name: value for name, value in metrics.items() if "/seed_" not in name}, step)

    def finalize(self, status: str = "success") -> None:
        super().finalize(status)
        for run in self._runs_of_seeds.values():
            run.finalize(status)

    @property
    def _id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    @cached_property
    def _runs_of_seeds(self) -> dict[int, MLFlowLogger]:
        """Seed -> its run, of those that there are."""
        inside = self.experiment.search_runs([self.experiment_id], f"tags.`{PARENT_TAG}` = '{self._id}'")
        return {int(run.data.tags[SEED_TAG]): self._logger(run.info.run_id) for run in inside}

    def _run_of(self, seed: int) -> MLFlowLogger:
        """The run of one seed, made if there is none."""
        if seed not in self._runs_of_seeds:
            self._runs_of_seeds[seed] = self._make_run(seed)
        return self._runs_of_seeds[seed]

    def _make_run(self, seed: int) -> MLFlowLogger:
        """A new run for one seed, described as the whole run is."""
        whole = self.experiment.get_run(self._id)
        name = re.sub(r"seeds \d+ to \d+", f"seed {seed}", whole.info.run_name)
        tags = {key: value for key, value in whole.data.tags.items() if not key.startswith("mlflow.")}
        tags |= {PARENT_TAG: self._id, SEED_TAG: str(seed)}
        made = self.experiment.create_run(self.experiment_id, run_name=name, tags=tags)
        run = self._logger(made.info.run_id)
        run.log_hyperparams(whole.data.params | {"seed": seed, "seeds": 1})
        return run

    def _logger(self, run_id: str) -> MLFlowLogger:
        run = MLFlowLogger(tracking_uri=self._tracking_uri, run_id=run_id)
        _ = run.experiment  # it is only finished if it has begun
        return run


def start_run(uri: str, experiment: str, run_dir: Path) -> MLflow:
    """The run at `uri` that `run_dir/mlflow_run_id` names, or a new one that the file names from now on.

    Only the main process makes a run.

    Raises:
        UserError: as `have_experiment` does, or if the run has been deleted.
    """
    have_experiment(uri, experiment)
    remembered = run_dir / "mlflow_run_id"
    run_id = (remembered.read_text().strip() if remembered.exists() else "") or None
    run = MLflow(experiment_name=experiment, run_name=run_dir.name, tracking_uri=uri, run_id=run_id)
    if is_main_process():
        if run_id is not None:
            _check_run(uri, run_id, remembered)
        with replacing(remembered) as part:
            part.write_text(str(run.run_id))
    return run


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
