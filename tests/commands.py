"""Running the project's commands as a user does, without waiting for their imports each time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

import psutil

from tests.zygote import NUMBER

ROOT = Path(__file__).parents[1]
# What a command finds imported. No import may start a thread: threads do not survive a fork, but their locks do.
PRELOADED = (
    "deflow.benchmark",
    "deflow.data.generate.runner",
    "deflow.distillation",
    "deflow.inspection",
    "deflow.pipeline",
    "deflow.reproduction.reproduce",
    "deflow.serving.serve",
    "deflow.serving.server",
    "deflow.sharing.push",
    "matplotlib.figure",
    "mlflow",
    "ogbench",
    "rich.progress",
    "sklearn.neighbors",
    "torch._dynamo",
)

HANGS = 900.0  # seconds after which a command is taken to hang: no machine is so slow


# Everything that costs time, made small.
TINY = (
    "networks.hidden=[16,16]",
    "updates=6",
    "eval.every=3",
    "eval.episodes=2",
    "eval.num_envs=2",
    "validate_every=3",
    "checkpoint_every=2",
    "data.batch_size=8",
    "data.validation_batches=2",
    "trainer.log_every_n_steps=2",
    "logger=csv",
    "video.episodes=0",
    "diversity.states=4",
    "diversity.samples=4",
    "diversity.neighbours=4",
    "threads=1",
)


class Command:
    """A command under way in a session of its own, with what tests need of `Popen`; its output goes to files.

    Args:
        args: of the command, the script first.
        pid: number of its process and of its session.
        ended: gives the exit status once there is one, negative for a signal.
        files: of its standard output and standard error, unless nobody reads them.
    """

    def __init__(self, args: list[str], pid: int, ended: Callable[[], int | None], files: Sequence[IO] = ()) -> None:
        self.args, self.pid, self.returncode = args, pid, None
        self._ended, self._files = ended, files
        UNDER_WAY.append(self)

    def poll(self) -> int | None:
        """The exit status, or None while the command runs."""
        if self.returncode is None:
            self.returncode = self._ended()
        return self.returncode

    def wait(self, timeout: float = HANGS) -> int:
        """The exit status, when there is one.

        Raises:
            subprocess.TimeoutExpired: if the command still runs after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def wait_for(self, condition: Callable[[], object], timeout: float = HANGS) -> None:
        """Wait until `condition` holds; fails with the command's errors if that ends before, or after `timeout`."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"ended with {self.returncode}: {self.output()[1]}"
            assert time.monotonic() < deadline, f"nothing after {timeout} s: {self.output()[1]}"
            time.sleep(0.01)

    def communicate(self, timeout: float = HANGS) -> tuple[str, str]:
        """What the command wrote to standard output and standard error, when it has ended."""
        self.wait(timeout)
        return self.output()

    def output(self) -> tuple[str, str]:
        """What the command has written to standard output and standard error so far."""
        if not self._files:
            return "", ""
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in self._files)
        return out.decode(), err.decode()

    def send_signal(self, number: int) -> None:
        """Send a signal to the command, not to processes that it started."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def processes(self) -> list[psutil.Process]:
        """All that live of the command and what it started."""
        return [process for process in psutil.process_iter() if _session(process) == self.pid]

    def wait_for_others(self, timeout: float = HANGS) -> None:
        """Wait until nothing that the command started lives; fails after `timeout`."""
        deadline = time.monotonic() + timeout
        while others := self.processes():
            assert time.monotonic() < deadline, f"still there: {others}"
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the command and whatever it started."""
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)
        self.wait()


UNDER_WAY: list[Command] = []  # what `kill_left_over` looks after


def start(
    script: str, *overrides: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, fresh: bool = False
) -> Command:
    """Start a command of the project.

    Args:
        script: its file's name.
        overrides: its arguments.
        cwd: folder to start it in.
        environment: variables beside those of this process.
        fresh: whether Python itself is started anew, and not a process that has imported everything. Variables
            that are read by an import (OMP_NUM_THREADS, MUJOCO_GL) need that.
    """
    args = [str(ROOT / script), *overrides]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the command is)
    if fresh:
        process = subprocess.Popen(
            [sys.executable, *args],
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        return Command(args, process.pid, process.poll, (out, err))
    reading, writing = os.pipe()
    request = {"arguments": args, "cwd": str(cwd), "environment": variables}
    socket.send_fds(_zygote(), [json.dumps(request).encode() + b"\n"], [out.fileno(), err.fileno(), writing])
    os.close(writing)
    status = open(reading, "rb", buffering=0)  # noqa: SIM115 (as above)
    pid = status.read(NUMBER.size)
    assert pid, "the process that forks into commands has died"
    os.set_blocking(reading, False)

    def ended() -> int | None:
        code = status.read(NUMBER.size)
        return None if code is None else NUMBER.unpack(code)[0]

    return Command(args, NUMBER.unpack(pid)[0], ended, (out, err))


def run(
    script: str,
    *overrides: str,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    fresh: bool = False,
    timeout: float = HANGS,
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project to its end; the arguments are those of `start`."""
    command = start(script, *overrides, cwd=cwd, environment=environment, fresh=fresh)
    try:
        out, err = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(command.args, command.wait(), out, err)


def kill_left_over() -> list[str]:
    """Kill whatever is left of all commands so far; its command lines."""
    left = []
    while UNDER_WAY:
        command = UNDER_WAY.pop()
        left += [" ".join(_command_line(process)) for process in command.processes()]
        command.kill()
    return left


def tiny_overrides(data: Path, folder: Path, *overrides: str) -> list[str]:
    """Overrides of a training command that ends in seconds and writes into `folder`."""
    return ["experiment=pointmaze", *TINY, f"paths.data={data}", f"hydra.run.dir={folder}", *overrides]


@cache
def _zygote() -> socket.socket:
    """This process's line to the process that forks into commands, which lives as long as the line."""
    ours, theirs = socket.socketpair()
    subprocess.Popen(
        [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *PRELOADED],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    return ours


def _session(process: psutil.Process) -> int | None:
    """Number of a living process's session."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.NoSuchProcess, OSError):
        return None


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
