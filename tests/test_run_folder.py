"""A run's folder: refused if it holds a run or somebody is in it, and only our own files are taken away again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deflow import run_folder
from deflow.errors import UserError
from deflow.pipeline import train
from deflow.run_folder import BEFORE_THE_FIRST_UPDATE, SIGNS_OF_A_RUN, RunFolder, new_run_folder
from tests import commands
from tests.conftest import compose_config, tiny_config


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its time of change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_run_that_fails_takes_away_nothing_but_its_own(point_data: Path, tmp_path: Path) -> None:
    for name in ("train.py", "train.log", "README.md"):
        (tmp_path / name).write_text("somebody's")
    (tmp_path / "replay").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        train(tiny_config(point_data, "experiment=pointmaze", "ckpt=nowhere.ckpt"), tmp_path)
    assert contents(tmp_path) == before
    assert (tmp_path / "replay").is_dir()


def test_what_a_run_without_an_update_left_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunFolder(folder, resume=False) as held:
        for name in BEFORE_THE_FIRST_UPDATE:
            if not (folder / name).exists():
                (folder / name).write_text("ours")
        (folder / "foreign").write_text("somebody's")
        held.discard()
        assert [path.name for path in folder.iterdir()] == ["foreign"]
        (folder / "foreign").unlink()
        held.discard()
    assert not folder.exists()


def test_the_code_of_every_process_is_noted_when_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for resume, commit in ((False, "a"), (True, "b"), (True, "b"), (True, "a-dirty")):
        monkeypatch.setattr(run_folder, "commit", lambda commit=commit: commit)
        with RunFolder(tmp_path / "run", resume):
            pass
    assert run_folder.commits_of(tmp_path / "run") == ["a", "b", "a-dirty"]
    (tmp_path / "old").mkdir()
    with RunFolder(tmp_path / "old", resume=True):  # of code that did not note it
        assert run_folder.commits_of(tmp_path / "old") == ["unknown", "a-dirty"]


def test_an_empty_folder_that_was_there_stays(tmp_path: Path) -> None:
    with RunFolder(tmp_path, resume=False) as held:
        held.discard()
    assert tmp_path.is_dir()


@pytest.mark.parametrize("sign", SIGNS_OF_A_RUN)
def test_a_new_run_does_not_begin_in_another(sign: str, point_data: Path, tmp_path: Path) -> None:
    (tmp_path / sign).write_text("of a run")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"holds a run already: go on with it by resume={tmp_path}"):
        train(tiny_config(point_data, "experiment=pointmaze"), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_one_process_at_a_time(resume: bool, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from deflow.run_folder import RunFolder
with RunFolder(Path({str(tmp_path)!r}), resume={resume}):
    print("held", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"is in use by process {other.pid} on .*, since 20"),
            RunFolder(tmp_path, resume),
        ):
            pass
    finally:
        other.send_signal(signal.SIGKILL)  # nothing is left locked
        other.communicate()
    with RunFolder(tmp_path, resume):
        pass


def test_the_other_processes_of_a_run_do_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path, resume=False):
        (tmp_path / "config.yaml").touch()
        monkeypatch.setattr("deflow.distributed.is_main_process", lambda: False)
        with RunFolder(tmp_path, resume=False) as held:
            held.discard()
        assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_file_is_no_folder(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .* as a run's folder"), RunFolder(tmp_path / below, resume=False):
        pass
    with pytest.raises(UserError, match=r"cannot use .* as a run's folder"):
        new_run_folder(str(tmp_path / "file"), "name", None)


def test_two_that_begin_in_the_same_second(tmp_path: Path) -> None:
    folders = {new_run_folder(str(tmp_path), "name", None) for _ in range(3)}
    assert len(folders) == 3
    assert all(Path(folder).is_dir() for folder in folders)


@pytest.mark.parametrize("there", [False, True])
def test_hydra_makes_no_folder_that_stays(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    settings = ("experiment=pointmaze", f"paths.data={tmp_path}", "data.source.download=false", "logger=csv")
    result = commands.run("train.py", *settings, f"hydra.run.dir={folder}")
    assert result.returncode == 2, result.stderr
    assert folder.exists() == there


@pytest.mark.usefixtures("short_episodes")
def test_a_finished_run_stays_as_it_is(point_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary = train(tiny_config(point_data, "experiment=pointmaze"), tmp_path)
    before = contents(tmp_path)
    shown = capsys.readouterr().out
    again = train(compose_config(f"resume={tmp_path}"), tmp_path)
    assert again == summary
    assert contents(tmp_path) == before
    assert capsys.readouterr().out.splitlines()[-8:] == shown.splitlines()[-8:]


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize(
    ("summary", "episodes"), [(b'{"task": \xff', b""), (b"{}", b'[{"index": 0, "path": 3}]'), (b"null", b"[3]")]
)
def test_a_damaged_summary_is_made_anew(
    summary: bytes, episodes: bytes, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "summary.json").write_bytes(summary)
    (run / "episodes.json").write_bytes(episodes)
    made = train(compose_config(f"resume={run}"), run)
    assert json.loads((run / "summary.json").read_text()) == made
    assert "summary.json is damaged: it is made anew" in caplog.text
    assert "episodes.json is damaged: the report will lack the paths" in caplog.text
