"""What is imported, when, and without a search for garbage."""

from __future__ import annotations

import gc
import os
import signal

import pytest

from deflow import signals
from deflow.imports import quick_imports
from deflow.signals import Stopped


def test_nothing_searches_for_garbage_while_importing() -> None:
    assert gc.isenabled()
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


def test_no_import_is_cut_by_a_signal() -> None:
    imported = []

    def command() -> None:
        with signals.listening():
            with quick_imports():
                os.kill(os.getpid(), signal.SIGTERM)
                imported.append(True)
            pytest.fail("went on")

    with pytest.raises(Stopped):
        command()
    assert imported
    gc.unfreeze()
