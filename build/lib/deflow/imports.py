"""Importing what is big, fast."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from deflow.signals import patient


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside without the search for garbage, which is a fifth of the time that torch, Lightning and MLflow take.

    Python looks through everything imported so far again and again, and none of it is garbage. What is there at the
    end is not looked through later either. A signal is put off: half an import can neither be used nor begun again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with patient():
            yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
