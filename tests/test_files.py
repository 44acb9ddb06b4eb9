"""Files that appear whole or not at all, and locks that say what they wait for."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from deflow import files
from deflow.errors import UserError
from deflow.files import locked, replacing_all
from deflow.report import write_json


def test_files_that_belong_together_appear_when_the_last_is_whole(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("card", "data")]
    with replacing_all(paths) as parts:
        for part in parts:
            part.write_text("new")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["new", "new"]
    with pytest.raises(FileNotFoundError), replacing_all(paths) as parts:
        parts[0].write_text("newer")  # and never the second
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"card": "new", "data": "new"}


def test_json_holds_to_its_own_rules(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"a": [1, float("nan"), {"b": -float("inf")}], "c": (0.5, None, "NaN")})
    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"a": [1, None, {"b": None}], "c": [0.5, None, "NaN"]}


def test_a_long_wait_for_a_lock_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.01)
    lock = tmp_path / "folder" / "lock"
    lock.parent.mkdir()
    other = FileLock(lock)
    other.acquire()
    entered = threading.Event()

    def wait() -> None:
        with locked(lock, "the data set"):
            entered.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while not caplog.messages:
        time.sleep(0.01)
    assert caplog.messages == [f"waiting for the data set: another process holds {lock}"]
    assert not entered.is_set()
    other.release()
    thread.join()
    assert entered.is_set()
    assert len(caplog.messages) == 1


def test_a_lock_is_given_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="inside"), locked(tmp_path / "new" / "lock", "nothing"):
            raise ValueError("inside")
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*file"), locked(tmp_path / "file" / "lock", "nothing"):
        pass
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="Permission denied"), locked(tmp_path / "lock", "nothing"):
            pass
        tmp_path.chmod(0o700)
