"""A tracker that fails, stalls or refuses: nothing is lost that can be delivered, in order, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from deflow import tracking
from deflow.callbacks import SystemMetrics
from deflow.pipeline import train
from deflow.tracking import Tracker
from tests.conftest import tiny_config


class Stub(Logger):
    """Takes rows, after so many failures, but for those it refuses."""

    name, version = "stub", "1"

    def __init__(self, failures: float = 0, refused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.failures, self.refused = failures, refused
        self.open = threading.Event()
        self.open.set()
        self.steps: list[int] = []
        self.calls: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.open.wait()
        if self.failures > 0:
            self.failures -= 1
            raise RuntimeError("the disk is full\nand more")
        if step in self.refused:
            raise ValueError("not this one")
        self.steps.append(step or 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append("settings")

    def finalize(self, status: str) -> None:
        self.calls.append(status)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.5)


def log_rows(tracker: Tracker, steps: int = 5) -> None:
    for step in range(1, steps + 1):
        tracker.log_metrics({"loss": 1.0}, step)


def test_rows_arrive_in_order(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(stub := Stub())
    log_rows(tracker)
    tracker.log_artifact(Path("file"))  # no place for it
    tracker.finalize("success")
    tracker.flush()
    assert stub.steps == [1, 2, 3, 4, 5]
    assert stub.calls == ["success"]
    assert not caplog.messages


@pytest.mark.parametrize("failures", [2, 19, 20])
def test_a_failure_is_said_once_and_tried_again(failures: int, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(stub := Stub(failures=failures))
    log_rows(tracker)
    deadline = time.monotonic() + 60
    while len(stub.steps) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    tracker.flush()
    assert sorted(stub.steps) == [1, 2, 3, 4, 5]
    if failures < tracking.REFUSED_AFTER:
        assert stub.steps == [1, 2, 3, 4, 5]
    assert caplog.messages == [
        "Stub fails (the disk is full): training goes on and tries again; metrics.csv has every row"
    ]


def test_what_is_refused_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(stub := Stub(refused=(2, 4)))
    log_rows(tracker)
    tracker.flush()
    assert stub.steps == [1, 3, 5]
    assert caplog.messages[-1] == "Stub lacks what the run's folder has (rows: 2)"


def test_what_never_arrives_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(Stub(failures=float("inf")), upload=lambda path: None)
    log_rows(tracker)
    tracker.log_artifact(Path("file"))
    started = time.monotonic()
    tracker.finalize("failed")
    assert time.monotonic() - started < 30
    assert len(caplog.messages) == 2
    assert caplog.messages[-1] == "Stub lacks what the run's folder has (rows: 5, files: 1)"


def test_nobody_waits_for_a_slow_tracker() -> None:
    tracker = Tracker(stub := Stub())
    stub.open.clear()
    row = {"loss": 1.0}
    tracker.log_metrics(row, 1)
    row.clear()  # what was logged was logged
    tracker.finalize("success")
    assert stub.steps == stub.calls == []
    stub.open.set()
    tracker.flush()
    assert (stub.steps, stub.calls) == ([1], ["success"])


def test_only_the_main_process_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(stub := Stub())
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_rows(tracker)
    tracker.log_hyperparams({})
    tracker.log_artifact(Path("file"))
    tracker.finalize("failed")
    tracker.flush()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    tracker.flush()
    assert stub.steps == stub.calls == []


@pytest.mark.usefixtures("short_episodes")
def test_a_run_with_a_logger_that_always_raises(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deflow.loggers.csv_only", lambda run_dir: Stub(failures=float("inf")))
    summary = train(tiny_config(point_data, "experiment=pointmaze"), tmp_path)
    assert summary["updates"] == 6
    assert sum("Stub fails" in message for message in caplog.messages) == 1
    assert any("Stub lacks what the run's folder has" in message for message in caplog.messages)


def test_system_metrics_are_rows_of_the_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = Tracker(stub := Stub())
    rows: list[dict[str, float]] = []
    monkeypatch.setattr(stub, "log_metrics", lambda metrics, step: rows.append(metrics | {"step": step}))
    agent = type("Agent", (), {"run_step": 7})()
    monitor = SystemMetrics(tracker)
    monitor.on_train_start(None, agent)  # type: ignore[arg-type]
    while len(rows) < 2:
        time.sleep(0.01)
    monitor.on_train_end(None, agent)  # type: ignore[arg-type]
    assert {"step", "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= rows[0].keys()
    assert rows[0]["step"] == 7
