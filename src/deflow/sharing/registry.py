"""MLflow's model registry: a policy's files as the artifacts of a run, and a version of a model that points to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deflow.errors import UserError
from deflow.imports import quick_imports
from deflow.mlflow_store import Setting, calm_mlflow, check_store, have_experiment
from deflow.sharing.address import LATEST, POLICY, RegistryAddress

EXPERIMENT = "shared"
FOLDER = "policy"  # of the run's artifacts
URI = "MLFLOW_TRACKING_URI"  # variable
DEFAULT_URI = "sqlite:///logs/mlflow.db"  # where trainings are logged, unless paths.logs is another
SETTING = Setting(f"tracking_uri, or {URI}", "share it elsewhere")
SETTING_TO_READ = Setting(URI, "load the policy from elsewhere")


def store_of(tracking_uri: str | None) -> str:
    """`sqlite:///...` or `http(s)://...`: what is given, or what the variable names, or where trainings are logged."""
    return tracking_uri or os.environ.get(URI) or DEFAULT_URI


def register(address: RegistryAddress, tracking_uri: str | None, files: Mapping[str, bytes], card: str) -> str:
    """Make a new version of a model, which is made if it is missing.

    Args:
        address: of the model; the version is MLflow's to number.
        tracking_uri: see `store_of`.
        files: name -> content, the artifacts of a run in the experiment `EXPERIMENT`.
        card: the version's description, Markdown.

    Returns:
        The address of the version.

    Raises:
        UserError: if MLflow cannot be written to.
    """
    uri = store_of(tracking_uri)
    _set_up()
    with _errors_in_one_line(uri):
        from mlflow.tracking import MlflowClient

        have_experiment(uri, EXPERIMENT, SETTING)
        client = MlflowClient(uri, registry_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        run = client.create_run(experiment.experiment_id, run_name=address.name).info
        try:
            with TemporaryDirectory() as folder:
                for name, content in files.items():
                    Path(folder, name).write_bytes(content)
                client.log_artifacts(run.run_id, folder, FOLDER)
            _have_model(client, address.name)
            source = f"{run.artifact_uri}/{FOLDER}"
            version = client.create_model_version(address.name, source, run.run_id, description=card)
        except BaseException:
            client.delete_run(run.run_id)
            raise
        client.set_terminated(run.run_id)
    return str(RegistryAddress(address.name, str(version.version)))


@contextmanager
def downloaded(address: RegistryAddress, tracking_uri: str | None) -> Iterator[Path]:
    """The policy's file of a version, as long as the context lasts.

    Raises:
        UserError: if there is no such version, it holds no policy, or MLflow cannot be read.
    """
    uri = store_of(tracking_uri)
    check_store(uri, SETTING_TO_READ)
    _set_up()
    with TemporaryDirectory() as folder:
        with _errors_in_one_line(uri):
            file = _download(address, uri, folder)
        yield file


def _download(address: RegistryAddress, uri: str, folder: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    numbers = sorted(int(one.version) for one in client.search_model_versions(f"name = '{address.name}'"))
    if not numbers:
        raise UserError(f"MLflow at {uri} has no model {address.name}")
    number = numbers[-1] if address.version == LATEST else int(str(address.version))
    if number not in numbers:
        raise UserError(f"{address.name} has no version {number} in MLflow at {uri}: the newest is {numbers[-1]}")
    source = client.get_model_version_download_uri(address.name, str(number))
    try:
        return Path(download_artifacts(f"{source}/{POLICY}", dst_path=folder, tracking_uri=uri, registry_uri=uri))
    except (OSError, MlflowException) as error:
        raise UserError(f"{address} holds no {POLICY} that can be read: it is nothing push.py has shared") from error


def _have_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _set_up() -> None:
    calm_mlflow()
    with quick_imports():
        import mlflow.tracking  # noqa: F401


@contextmanager
def _errors_in_one_line(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"MLflow at {uri} fails ({reason}): mend it, or {SETTING.instead}") from error
