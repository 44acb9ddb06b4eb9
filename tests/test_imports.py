"""What is imported, when, and without a search for garbage."""

from __future__ import annotations

import gc

import pytest

from deflow.imports import quick_imports


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
