"""Trackers: a real MLflow server on loopback, sqlite across a resume, and metrics.csv after a cut."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deflow.loggers import CsvMetrics, read_metrics
from deflow.pipeline import train
from tests.commands import Command
from tests.conftest import compose_config, tiny_config

pytestmark = pytest.mark.usefixtures("short_episodes")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/art"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    server = Command(command, process.pid, process.poll)
    server.wait_for(lambda: answers(uri))
    yield uri
    server.kill()


def answers(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=10).ok
    except requests.RequestException:
        return False


def run_of(uri: str):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pointmaze")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    return client, runs[0]


def test_metrics_reach_a_server(server: str, point_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ("logger=mlflow", f"logger.tracking_uri={server}", "stages=staged")
    summary = train(tiny_config(point_data, "experiment=pointmaze", *overrides), folder)
    client, run = run_of(server)
    history = client.get_metric_history(run.info.run_id, "train/critic/loss")
    csv = [
        (row["step"], row["train/critic/loss"])
        for row in read_metrics(folder / "metrics.csv")
        if "train/critic/loss" in row
    ]
    assert [(point.step, pytest.approx(point.value)) for point in history] == csv
    assert [step for step, _ in csv] == [8, 10, 12]  # one axis over both stages
    assert run.data.metrics["eval/success"] == summary["eval/success"]["last"]
    assert run.data.params["agent/trust_region"] == "0.01"
    assert {"config.yaml", "report.png", "summary.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}


def test_resume_goes_on_with_the_same_run(point_data: Path, tmp_path: Path) -> None:
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    train(tiny_config(point_data, "experiment=pointmaze", "logger=mlflow", f"logger.tracking_uri={uri}"), folder)
    (folder / "checkpoints" / "0_joint" / "final.ckpt").unlink()  # as if killed before the end
    train(compose_config(f"resume={folder}"), folder)
    _, run = run_of(uri)
    assert run.info.run_id == (folder / "mlflow_run_id").read_text()


def test_csv_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = CsvMetrics(path)
    metrics.log_metrics({"a": 1.0}, step=1)
    metrics.log_metrics({"b": 2.0}, step=2)
    metrics.log_metrics({"a": 3.0}, step=3)
    with path.open("a") as file:
        file.write("4,0.")  # cut by a kill
    resumed = CsvMetrics(path, last_step=2)
    resumed.log_metrics({"a": 5.0, "b": 6.0}, step=3)
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 2, "b": 2}, {"step": 3, "a": 5, "b": 6}]


def test_tensorboard(point_data: Path, tmp_path: Path) -> None:
    train(tiny_config(point_data, "experiment=pointmaze", "logger=tensorboard"), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))
