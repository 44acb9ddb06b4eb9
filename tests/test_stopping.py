"""Kills and signals at every kind of moment: the run that goes on ends with the uninterrupted one's bits and rows."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deflow import pipeline, report, signals
from deflow.agents.base import Agent
from deflow.callbacks import AtomicCheckpointIO
from deflow.checkpoints import load_checkpoint
from deflow.data.datamodule import OfflineDataModule
from deflow.data.memory.replay import Replay
from deflow.errors import UserError
from deflow.evaluation.rollout import Evaluator
from deflow.loggers import CsvMetrics
from deflow.pipeline import train
from deflow.run_folder import RunFolder
from deflow.signals import Stopped
from tests.conftest import compose_config, tiny_config
from tests.test_pipeline import assert_equal_weights

pytestmark = pytest.mark.usefixtures("short_episodes")

# Rows are logged at other steps than checkpoints are made, so that what a row sums up must be in the checkpoint.
STAGES = {
    "staged": ("stages=staged", "stages.extraction.proposals=2", "trainer.log_every_n_steps=2"),
    "offline_to_online": (
        "stages=offline_to_online",
        "updates=4",
        "online_updates=26",
        "eval.every=13",
        "trainer.log_every_n_steps=3",
    ),
}

# Where a run can be cut: before a call of one of these.
MOMENTS: dict[str, tuple[Any, str]] = {
    "data": (OfflineDataModule, "setup"),
    "begin": (CsvMetrics, "_rewrite"),
    "update": (Agent, "training_step"),
    "validation": (Agent, "validation_step"),
    "row": (CsvMetrics, "log_metrics"),
    "evaluation": (Evaluator, "run"),
    "step": (Evaluator, "_step_all"),  # in the middle of an evaluation
    "checkpoint": (AtomicCheckpointIO, "save_checkpoint"),
    "draw": (Replay, "sample"),
    "report": (pipeline, "finish"),
}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def before_call(patch: pytest.MonkeyPatch, moment: str, number: int, strike: Callable[[], None]) -> None:
    """Call `strike` just before call `number` of a moment."""
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            strike()
        return original(*args, **kwargs)

    patch.setattr(owner, name, counting)


def kill() -> None:
    raise Killed


@contextmanager
def nothing_is_tidied_up() -> Iterator[None]:
    """As after a kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "discard", lambda self: None)
        yield


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, data: Path, stages: str) -> None:
    train(tiny_config(data, "experiment=pointmaze", *STAGES[stages]), folder)


def cut(strike: Callable[[], None], moment: str, number: int, folder: Path, data: Path, stages: str = "staged") -> None:
    """A run that listens to signals, struck just before call `number` of a moment."""
    with pytest.MonkeyPatch.context() as patch, signals.listening():
        before_call(patch, moment, number, strike)
        run(folder, data, stages)


@pytest.fixture(scope="module")
def whole(tiny_data: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole(stages)`: the folder of a run that nothing interrupted, made at most once."""
    folders: dict[str, Path] = {}

    def make(stages: str) -> Path:
        if stages not in folders:
            folders[stages] = tmp_path_factory.mktemp(stages)
            run(folders[stages], tiny_data("pointmaze-medium", "navigate"), stages)
        return folders[stages]

    return make


def assert_the_same(folder: Path, whole: Path) -> None:
    """Weights of all stages, the replay, every row, and the episodes of the last evaluation."""
    checkpoints = sorted(path.relative_to(whole) for path in whole.rglob("final.ckpt"))
    assert checkpoints
    for path in checkpoints:
        assert_equal_weights(*(load_checkpoint(each / path)["state_dict"] for each in (folder, whole)))
    for name in ("metrics.csv", "episodes.json", "replay/online_0.bin"):
        if (whole / name).exists():
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    summaries = [json.loads((each / "summary.json").read_text()) for each in (folder, whole)]
    assert summaries[0]["eval/success"] == summaries[1]["eval/success"]
    assert not list(folder.rglob(".part-*"))


@pytest.mark.parametrize(
    ("stages", "moment", "number"),
    [
        ("staged", "begin", 1),  # nothing but the configuration is there
        ("staged", "update", 4),  # a validation and a checkpoint lie behind
        ("staged", "update", 7),  # the first of the second stage
        ("staged", "validation", 4),
        ("staged", "row", 3),  # the checkpoint of its step has not been written
        ("staged", "row", 10),
        ("staged", "evaluation", 1),
        ("staged", "evaluation", 2),  # the last
        ("staged", "checkpoint", 3),  # the final one of the first stage
        ("staged", "checkpoint", 6),
        ("staged", "report", 1),
        ("offline_to_online", "draw", 2),
        ("offline_to_online", "draw", 12),  # in the middle of an episode of 20 steps
        ("offline_to_online", "draw", 24),
        ("offline_to_online", "checkpoint", 9),
        ("offline_to_online", "evaluation", 2),
    ],
)
def test_a_kill_changes_nothing(
    stages: str, moment: str, number: int, whole: Callable[[str], Path], point_data: Path, tmp_path: Path
) -> None:
    expected = whole(stages)
    with nothing_is_tidied_up(), pytest.raises(Killed):
        cut(kill, moment, number, tmp_path, point_data, stages)
    train(compose_config(f"resume={tmp_path}"), tmp_path)
    assert_the_same(tmp_path, expected)


@pytest.mark.parametrize(
    ("stages", "moment", "number", "saved"),
    [
        ("staged", "update", 1, 1),
        ("staged", "update", 5, 5),
        ("staged", "update", 6, 6),  # the last of its stage: that is finished first
        ("staged", "row", 2, 3),
        ("staged", "validation", 1, 3),
        ("staged", "step", 1, 3),  # the evaluation is cut, and made up for later
        ("staged", "step", 30, 6),  # the last one
        ("offline_to_online", "draw", 2, 2),
        ("offline_to_online", "draw", 15, 15),
        ("offline_to_online", "step", 30, 13),
    ],
)
def test_a_signal_changes_nothing_and_loses_no_update(
    stages: str, moment: str, number: int, saved: int, whole: Callable[[str], Path], point_data: Path, tmp_path: Path
) -> None:
    expected = whole(stages)
    with pytest.raises(Stopped) as stopped:
        cut(terminate, moment, number, tmp_path, point_data, stages)
    assert str(stopped.value) == f"stopped by SIGTERM: go on by python train.py resume={tmp_path}"
    newest = max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert load_checkpoint(newest)["global_step"] == saved
    train(compose_config(f"resume={tmp_path}"), tmp_path)
    assert_the_same(tmp_path, expected)


def test_a_job_that_slurm_queued_again_goes_on_with_its_run(
    whole: Callable[[str], Path], point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole("staged")
    with nothing_is_tidied_up(), pytest.raises(Killed):
        cut(kill, "update", 4, tmp_path, point_data)
    with pytest.raises(UserError, match="holds a run already"):
        run(tmp_path, point_data, "staged")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(tmp_path, point_data, "staged")
    assert_the_same(tmp_path, expected)


def test_a_signal_before_the_first_update_leaves_nothing(point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        cut(terminate, "data", 1, tmp_path / "run", point_data)
    assert str(stopped.value) == "stopped by SIGTERM: before the first update"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["data", "update"])
def test_a_fault_before_the_first_update_leaves_nothing(moment: str, point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        cut(kill, moment, 1, tmp_path / "run", point_data)
    assert not (tmp_path / "run").exists()


def test_the_time_of_all_parts_counts(point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        cut(kill, "update", 5, tmp_path, point_data)
    path = tmp_path / "checkpoints" / "0_behavior" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    checkpoint["deflow"]["seconds"] = 1000.0
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    train(compose_config(f"resume={tmp_path}"), tmp_path)
    assert 1000 < json.loads((tmp_path / "summary.json").read_text())["seconds"] < 2000


def test_a_report_that_a_kill_cut_off_has_the_paths(
    whole: Callable[[str], Path], point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads((whole("staged") / "episodes.json").read_text())
    with pytest.raises(Killed):
        cut(kill, "report", 1, tmp_path, point_data)
    drawn: list[Any] = []
    monkeypatch.setattr(report, "draw", lambda rows, episodes, *_: drawn.extend(episodes))
    train(compose_config(f"resume={tmp_path}"), tmp_path)
    assert [(episode.index, [list(point) for point in episode.path]) for episode in drawn] == [
        (episode["index"], episode["path"]) for episode in expected
    ]


def test_a_run_goes_on_from_elsewhere_and_without_what_it_began_with(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny_config(point_data, "experiment=pointmaze"), Path("first"))
    final = Path("first", "checkpoints", "0_joint", "final.ckpt")
    config = tiny_config(Path(os.path.relpath(point_data)), "experiment=pointmaze", f"ckpt={final}")
    with pytest.MonkeyPatch.context() as patch:
        before_call(patch, "update", 5, kill)
        with pytest.raises(Killed):
            train(config, Path("second"))
    final.unlink()
    monkeypatch.chdir(point_data)
    folder = tmp_path / "second"
    assert train(compose_config(f"resume={folder}"), folder)["updates"] == 6


def test_a_policy_on_a_given_flow_goes_on_with_its_proposals(
    whole: Callable[[str], Path], point_data: Path, tmp_path: Path
) -> None:
    flow = whole("staged") / "checkpoints" / "0_behavior" / "final.ckpt"
    settings = ("experiment=pointmaze", *STAGES["staged"], "~stages.behavior", f"ckpt={flow}")
    expected, folder = tmp_path / "whole", tmp_path / "cut"
    train(tiny_config(point_data, *settings), expected)
    with pytest.MonkeyPatch.context() as patch:
        before_call(patch, "update", 5, kill)
        with nothing_is_tidied_up(), pytest.raises(Killed):
            train(tiny_config(point_data, *settings), folder)
    train(compose_config(f"resume={folder}"), folder)
    assert_the_same(folder, expected)
    assert (folder / "proposals.npy").read_bytes() == (expected / "proposals.npy").read_bytes()


def test_a_full_disk_is_one_line(point_data: Path, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"; mend that, then go on by python train\.py 'resume=\S+my run'$"):
        cut(full, "row", 3, tmp_path / "my run", point_data)
