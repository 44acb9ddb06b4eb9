"""Offline reinforcement learning with flow policies: `deflow.train("antmaze", "seed=1")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deflow.notebook import train as train

HOME = {"train": "deflow.notebook"}  # of each name: imported when it is asked for, as torch takes seconds


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'deflow' has no attribute '{name}'")
    return getattr(import_module(HOME[name]), name)
