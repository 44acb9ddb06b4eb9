"""What a signal does: at once, or where it was put off until nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from deflow import signals
from deflow.signals import SIGNALS, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, signals.listening():
        send(number)
    assert stopped.value.status == 128 + number
    assert str(stopped.value) == f"stopped by {signal.Signals(number).name}"
    assert signal.getsignal(number) == before


def test_patience_puts_it_off_to_the_end() -> None:
    passed = []

    def work() -> None:
        with signals.listening(), signals.patient():
            send(signal.SIGTERM)
            passed.append(signals.pending())
            send(signal.SIGTERM)  # schedulers repeat themselves
            passed.append(signals.pending())

    with pytest.raises(Stopped):
        work()
    assert passed == [signal.SIGTERM] * 2


def test_a_second_interrupt_does_not_wait() -> None:
    def work() -> None:
        with signals.listening(), signals.patient():
            send(signal.SIGINT)
            send(signal.SIGINT)
            pytest.fail("waited")

    with pytest.raises(Stopped):
        work()


def test_patience_within_patience_does_not_end_it() -> None:
    passed = []

    def work() -> None:
        with signals.listening(), signals.patient():
            with signals.patient():
                send(signal.SIGTERM)
            passed.append(True)

    with pytest.raises(Stopped):
        work()
    assert passed


@pytest.mark.parametrize("before", [False, True])
def test_what_can_be_done_again_is_cut(before: bool) -> None:
    def work() -> None:
        with signals.listening(), signals.patient():
            if before:
                send(signal.SIGTERM)
            with signals.prompt():
                send(signal.SIGTERM)
                pytest.fail("went on")

    with pytest.raises(Stopped):
        work()


def test_another_library_in_front() -> None:
    with signals.listening(), signals.patient():
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("taken by another"))
        signals.take_over()
        send(signal.SIGTERM)
        assert signals.pending() == signal.SIGTERM
        signals._State.pending = None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signals.take_over()  # nobody listens
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_thread_leaves_the_signals_alone() -> None:
    found = []

    def run() -> None:
        with signals.listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("seconds_late", [0, 2])  # 2: the parent has ended before the watch begins
def test_a_process_ends_with_its_parent(seconds_late: int) -> None:
    child = "import sys, time; from deflow.signals import end_with_parent; print('ready', flush=True)"
    child += f"; time.sleep({seconds_late}); end_with_parent(int(sys.argv[1])); time.sleep(600)"
    parent = "import os, subprocess, sys"
    parent += "; p = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())]); p.wait()"
    command = [sys.executable, "-c", parent, child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""  # it closes when the last who holds it is gone
