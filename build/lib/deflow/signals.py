"""Signals that ask a command to end: SIGINT, SIGTERM, and SIGUSR1, by which schedulers announce a preemption."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The command was asked to end.

    Not an `Exception`: nothing that copes with faults may take it for one. Nor a `KeyboardInterrupt`: Lightning would
    leave the process in silence.

    Args:
        number: of the signal.
        agreed: whether all processes of the run stop.
    """

    def __init__(self, number: int, agreed: bool = False) -> None:
        super().__init__(number)
        self.number, self.agreed = number, agreed
        self.advice = ""  # what to do next

    @property
    def status(self) -> int:
        """The exit status that shells and schedulers expect of a process that a signal ended."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}" + (f": {self.advice}" if self.advice else "")


class _State:
    listening = False
    patient = False  # note a signal, and leave it to the training loop to end where nothing is lost
    pending: int | None = None  # the signal that was noted


@contextmanager
def listening() -> Iterator[None]:
    """Let the signals raise `Stopped` where the program stands, or be noted where it is `patient`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, as in a program that calls a command from a thread
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.listening, _State.pending = True, None
    take_over()
    try:
        yield
    finally:
        _State.listening, _State.pending = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


def take_over() -> None:
    """Handle the signals again after another library (Lightning, at the start of a fit) has put itself in front."""
    if _State.listening:
        for number in SIGNALS:
            signal.signal(number, _on_signal)


@contextmanager
def patient() -> Iterator[None]:
    """Only note a signal here; one that is still pending at the end is raised then. A second SIGINT never waits."""
    before, _State.patient = _State.patient, True
    try:
        yield
    finally:
        _State.patient = before
    if not _State.patient:
        _raise_pending()


@contextmanager
def prompt() -> Iterator[None]:
    """Where it is `patient`, raise at once all the same, because what is under way can be done again."""
    before, _State.patient = _State.patient, False
    try:
        _raise_pending()
        yield
    finally:
        _State.patient = before


def pending() -> int | None:
    """The signal that was noted, if there was one."""
    return _State.pending


def end_with_parent(parent: int) -> None:
    """Let this process end when its parent does: a rank whose peer was killed would wait for it for ever.

    Args:
        parent: number of that process, as it itself has said: it may have ended before this one could ask.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _on_signal(number: int, frame: FrameType | None) -> None:
    again = number == signal.SIGINT and _State.pending == number
    _State.pending = number
    if again or not _State.patient:
        raise Stopped(number)


def _raise_pending() -> None:
    if _State.pending is not None:
        raise Stopped(_State.pending)
