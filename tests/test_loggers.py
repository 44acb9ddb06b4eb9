"""Trackers: a real MLflow server on loopback, sqlite across a resume, and metrics.csv after a cut."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from deflow import mlflow_store, tracking
from deflow.agents.base import Agent
from deflow.errors import UserError
from deflow.loggers import CsvMetrics, mlflow_logger, read_metrics
from deflow.pipeline import train
from deflow.tracking import Tracker
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
    experiment = client.get_experiment_by_name("pointmaze_medium")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    return client, runs[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data base of MLflow's, as it is made."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder / "mlflow.db", "another")
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock", "run"}
    return folder / "mlflow.db"


@pytest.fixture
def database(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "mlflow.db"))


def start(database: Path, experiment: str = "pointmaze_medium") -> Tracker:
    run = database.with_name("run")
    run.mkdir(exist_ok=True)
    return mlflow_logger(f"sqlite:///{database}", experiment, str(run))


@pytest.mark.slow
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
    assert run.info.run_name == "deflow seed 0 pointmaze-medium-navigate"
    assert run.data.params["agent.trust_region"] == "0.01"
    assert run.data.tags.items() >= {"agent": "deflow", "stages": "behavior, extraction", "folder": str(folder)}.items()
    assert not any(name.endswith(("_low", "_high")) for name in run.data.metrics)  # no charts of their own
    assert {"config.yaml", "report.png", "summary.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}


def test_resume_goes_on_with_the_same_run(point_data: Path, database: Path) -> None:
    folder, uri = database.with_name("run"), f"sqlite:///{database}"
    train(tiny_config(point_data, "experiment=pointmaze", "logger=mlflow", f"logger.tracking_uri={uri}"), folder)
    (folder / "checkpoints" / "0_joint" / "final.ckpt").unlink()  # as if killed before the end
    train(compose_config(f"resume={folder}"), folder)
    _, run = run_of(uri)
    assert run.info.run_id == (folder / "mlflow_run_id").read_text()


def test_each_of_several_seeds_has_a_run_inside(point_data: Path, database: Path) -> None:
    folder, uri = database.with_name("run"), f"sqlite:///{database}"
    overrides = ("seeds=2", "seed=4", "logger=mlflow", f"logger.tracking_uri={uri}")
    train(tiny_config(point_data, "experiment=pointmaze", *overrides), folder)
    first = runs_of_seeds(uri)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "0_joint" / "final.ckpt").unlink()  # as if killed before the end
    train(compose_config(f"resume={folder}"), folder)
    whole, *of_seeds = resumed = runs_of_seeds(uri)
    assert [run.info.run_id for run in resumed] == [run.info.run_id for run in first]
    assert [run.info.run_name for run in resumed] == [
        f"deflow {seeds} pointmaze-medium-navigate" for seeds in ("seeds 4 to 5", "seed 4", "seed 5")
    ]
    assert [run.data.params["seed"] for run in of_seeds] == ["4", "5"]
    assert all(run.data.tags["mlflow.parentRunId"] == whole.info.run_id for run in of_seeds)
    assert {run.info.status for run in resumed} == {"FINISHED"}
    rows = [row for row in read_metrics(folder / "metrics.csv") if "eval/success" in row]
    for run, seed in zip(of_seeds, (4, 5), strict=True):
        assert run.data.metrics == {"eval/success": rows[-1][f"eval/success/seed_{seed}"]}
    assert whole.data.metrics["eval/success"] == rows[-1]["eval/success"]
    assert not any("seed_" in name for name in whole.data.metrics)


def runs_of_seeds(uri: str) -> list:
    """The whole run, then those inside it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pointmaze_medium")
    return sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.data.tags.get("seed", ""))


def sql(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as base, base:
        for statement in statements:
            base.execute(statement)


def is_cut(database: Path) -> None:
    database.write_bytes(database.read_bytes()[:5000])


def is_no_database(database: Path) -> None:
    database.write_text("nonsense, and more of it than a header has " * 100)


def is_half_made(database: Path) -> None:
    sql(database, "DROP TABLE alembic_version")


def has_lost_its_version(database: Path) -> None:
    sql(database, "DELETE FROM alembic_version")


def is_old(database: Path) -> None:
    sql(database, "UPDATE alembic_version SET version_num = 'old'")


@pytest.mark.parametrize(
    "damage,says",
    [
        (is_cut, "is no whole data base"),
        (is_no_database, "is no whole data base"),
        (is_half_made, "or half of one: move it away"),
        (has_lost_its_version, "is of another version of MLflow"),
        (is_old, "is of another version of MLflow: run 'mlflow db upgrade sqlite:///"),
    ],
)
def test_a_data_base_of_no_use_is_one_line(damage: Callable[[Path], None], says: str, database: Path) -> None:
    damage(database)
    before = database.read_bytes()
    with pytest.raises(UserError, match=says) as raised:
        start(database)
    assert "\n" not in str(raised.value)
    assert "logger=csv" in str(raised.value)
    assert database.read_bytes() == before


def test_a_data_base_that_is_locked_is_one_line(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "SERVER_TIMEOUT_SECONDS", 0.1)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"cannot be written to \(database is locked\): end or wait for who holds"):
            start(database)


def test_what_has_been_deleted_is_one_line(database: Path) -> None:
    tracker = start(database)
    client = tracker.logger.experiment  # type: ignore[attr-defined]
    client.delete_run(tracker.version)
    with pytest.raises(UserError, match=f"run {tracker.version} has been deleted: remove .*mlflow_run_id"):
        start(database)
    database.with_name("run").joinpath("mlflow_run_id").write_text("0" * 32)
    with pytest.raises(UserError, match=r"has been deleted: remove .*mlflow_run_id"):
        start(database)
    database.with_name("run").joinpath("mlflow_run_id").write_text("")  # cut by a kill
    assert start(database).version != tracker.version
    client.delete_experiment(client.get_experiment_by_name("pointmaze_medium").experiment_id)
    with pytest.raises(
        UserError, match=r"'pointmaze_medium' has been deleted: choose another, logger.experiment=NAME, or bring"
    ):
        start(database)


def test_a_data_base_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def dies(source: Path, target: Path) -> None:
        assert sqlite3.connect(source).execute("SELECT version_num FROM alembic_version").fetchall()
        shutil.copytree(Path(source).parent, tmp_path / "left")  # as a kill leaves it
        raise Killed

    database = tmp_path / "mlflow.db"
    database.touch()  # sqlite leaves an empty file as well, if it is killed early
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store.os, "replace", dies)
        with pytest.raises(Killed):
            start(database)
    assert database.read_bytes() == b""
    (tmp_path / "left").rename(tmp_path / ".part-mlflow.db-left")
    assert start(database).version
    assert not list(tmp_path.glob(".part-*"))


class Server(http.server.BaseHTTPRequestHandler):
    """As much of MLflow's server as a run asks for."""

    rows: list[tuple[str, int]] = []  # noqa: RUF012 (key and step of every metric)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        type(self).rows += [(metric["key"], int(metric["step"])) for metric in body.get("metrics", [])]
        run = {"info": {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}
        experiment = {"experiment_id": "1", "name": "pointmaze_medium", "lifecycle_stage": "active"}
        answer = json.dumps({"run": run, "experiment": experiment, "run_info": run["info"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass


def test_a_server_that_goes_away_in_mid_training(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.5)
    Server.rows = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def goes_away(agent: Agent, *arguments: object) -> object:
        if agent.run_step == 3:
            while not Server.rows:  # of step 2
                time.sleep(0.01)
            server.shutdown()
            server.server_close()
        return step(agent, *arguments)

    step = Agent.training_step
    monkeypatch.setattr(Agent, "training_step", goes_away)
    uri = f"http://127.0.0.1:{server.server_port}"
    train(tiny_config(point_data, "experiment=pointmaze", "logger=mlflow", f"logger.tracking_uri={uri}"), tmp_path)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.csv") if "train/critic/loss" in row]
    assert steps == [2, 4, 6]
    assert {step for _, step in Server.rows} <= {2, 3}
    assert len([message for message in caplog.messages if "MLflow fails" in message]) == 1
    (lost,) = [message for message in caplog.messages if "MLflow lacks" in message]
    assert "rows: " in lost
    assert "files: 4" in lost


def test_a_data_base_that_is_locked_in_mid_training(
    point_data: Path, database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.5)
    other = sqlite3.connect(database, isolation_level=None, check_same_thread=False)

    def locks(agent: Agent, *arguments: object) -> object:
        if agent.run_step == 3:
            other.execute("BEGIN EXCLUSIVE")
        return step(agent, *arguments)

    step = Agent.training_step
    monkeypatch.setattr(Agent, "training_step", locks)
    uri, folder = f"sqlite:///{database}", database.with_name("run")
    overrides = ("logger=mlflow", f"logger.tracking_uri={uri}")
    train(tiny_config(point_data, "experiment=pointmaze", *overrides), folder)
    assert [row["step"] for row in read_metrics(folder / "metrics.csv") if "train/critic/loss" in row] == [2, 4, 6]
    assert any("MLflow lacks" in message for message in caplog.messages)
    other.close()  # and what waited is delivered
    client = MlflowClient(uri)
    for _ in range(600):
        history = client.get_metric_history((folder / "mlflow_run_id").read_text(), "train/critic/loss")
        if len(history) == 3:
            break
        time.sleep(0.1)
    assert [point.step for point in history] == [2, 4, 6]


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


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (b"\xff\xfe\x00step", 1),
        (b"step,a\n1,2\n2,none\n", 2),
        (b"step,a\n1,2,3\n", 1),  # more cells than columns
        (b"step,a\n1\n", 1),  # fewer
        (b"step,a\n,2\n", 1),
        (b"a,b\n1,2\n", 1),
    ],
)
def test_damaged_metrics_are_named(content: bytes, row: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"metrics.csv is damaged at row {row} .*: mend it, or move it away"):
        CsvMetrics(path, last_step=2)
    assert path.read_bytes() == content


def test_a_number_that_a_kill_cut_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,a\r\n1,0.25\r\n2,0.1")
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "a": 0.25}]


@pytest.mark.usefixtures("rendered")
def test_tensorboard_has_the_pictures(point_data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(point_data, "experiment=pointmaze", "logger=tensorboard"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    assert events["images"] == ["report", "actions"]
    assert "eval/success" in events["scalars"]
    assert not any(name.endswith(("_low", "_high")) for name in events["scalars"])
