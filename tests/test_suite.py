"""The suite's own ground: commands that are real processes, die with their test, and runs that are made once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.commands import PRELOADED, Command, kill_left_over, run, start
from tests.conftest import working_tree

TELLING = """
import atexit, os, sys
atexit.register(lambda: print("bye"))
print(sys.argv[1:], os.getcwd(), os.environ["TOLD"], __name__, __file__, sys.path[0])
print("problem", file=sys.stderr)
sys.exit(3)
"""
# Says its child's number, and waits for ever beside it; SIGTERM is answered.
WAITING = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10000)"])
signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(7)))
print(child.pid, flush=True)
time.sleep(10000)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_command_is_a_process_like_any_other(fresh: bool, tmp_path: Path) -> None:
    path = script(tmp_path, TELLING)
    result = run(path, "a=1", "b c", cwd=tmp_path, environment={"TOLD": "yes"}, fresh=fresh)
    assert result.returncode == 3
    assert result.stdout.splitlines() == [f"['a=1', 'b c'] {tmp_path} yes __main__ {path} {tmp_path}", "bye"]
    assert result.stderr == "problem\n"


def waiting(folder: Path, fresh: bool) -> tuple[Command, psutil.Process]:
    command = start(script(folder, WAITING), fresh=fresh)
    command.wait_for(lambda: "\n" in command.output()[0])
    return command, psutil.Process(int(command.output()[0]))


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("fresh", [False, True])
def test_signals_reach_the_command(fresh: bool, tmp_path: Path) -> None:
    command, _ = waiting(tmp_path, fresh)
    command.send_signal(signal.SIGTERM)
    assert command.wait() == 7
    command.wait_for_others()  # the child is killed, which takes a moment
    command, child = waiting(tmp_path, fresh)
    command.send_signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert command.processes() == [child]
    command.kill()
    assert not runs(child)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_time_out_leaves_nothing_behind(fresh: bool, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    with pytest.raises(subprocess.TimeoutExpired):
        run(script(tmp_path, WAITING), fresh=fresh, timeout=0.5)
    after = [process for process in psutil.process_iter() if process.pid not in before and runs(process)]
    assert not [process for process in after if "time.sleep(10000)" in process.cmdline()]


def test_what_a_failing_test_leaves_is_killed_and_named(tmp_path: Path) -> None:
    _, child = waiting(tmp_path, fresh=True)
    left = kill_left_over()
    assert len(left) == 2
    assert any("script.py" in line for line in left)
    assert not runs(child)
    assert kill_left_over() == []


def test_commands_die_with_the_process_that_tests(tmp_path: Path) -> None:
    program = (
        "import sys; from tests import commands; commands.PRELOADED = (); "
        "print(commands.start(sys.argv[1]).pid, flush=True); input()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    tester = subprocess.Popen(
        [sys.executable, "-c", program, script(tmp_path, "import time; time.sleep(10000)")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert tester.stdout is not None
    command = psutil.Process(int(tester.stdout.readline()))
    assert runs(command)
    tester.kill()
    tester.communicate()
    command.wait(timeout=600)


def test_nothing_that_is_imported_ahead_starts_a_thread(tmp_path: Path) -> None:
    text = "import sys, threading; print(threading.active_count()); print(*sys.modules, sep='\\n')"
    count, *modules = run(script(tmp_path, text)).stdout.splitlines()
    assert count == "1"
    assert set(PRELOADED) <= set(modules)


def test_a_finished_run_is_trained_once(finished_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run()
    monkeypatch.setattr("tests.conftest.train", lambda *_: pytest.fail("trained again"))
    assert finished_run() == folder
    assert (folder / "checkpoints" / "0_joint" / "final.ckpt").exists()


def test_what_is_written_into_the_repository_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.conftest.ROOT", tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "logs").mkdir()
    before = working_tree()
    (tmp_path / ".hidden" / "file").touch()
    (tmp_path / "logs" / "file").touch()
    assert working_tree() - before == {tmp_path / "logs" / "file"}
