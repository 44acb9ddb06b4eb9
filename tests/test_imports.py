"""What is imported, when, and without a search for garbage."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import deflow
from deflow import signals
from deflow.imports import quick_imports
from deflow.signals import Stopped
from tests.commands import ROOT


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


def test_the_packages_names_are_there_and_cost_nothing_until_they_are_used() -> None:
    code = "import sys, deflow; assert not {'torch', 'numpy'} & set(sys.modules); assert callable(deflow.load)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
    )
    assert set(deflow.__all__) <= set(dir(deflow))
    assert all(callable(getattr(deflow, name)) for name in deflow.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        deflow.nonsense  # noqa: B018


@pytest.mark.parametrize("file", ["report.py", "finishing.py", "training.py", "evaluation/diversity.py"])
def test_no_room_knows_the_parts_of_an_agent(file: str) -> None:
    source = (Path(deflow.__file__).parent / file).read_text()
    assert not re.search(r"behavior_flow|refiner|\bcritic\b|\bactor\b|hasattr\(", source)
