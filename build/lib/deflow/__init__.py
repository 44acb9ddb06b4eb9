"""Offline reinforcement learning with flow policies: `deflow.train` makes a policy, `deflow.load` lets it act."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deflow.loading import load
    from deflow.notebook import train
    from deflow.policy import Policy

__all__ = ["Policy", "load", "train"]

# Where the names above are, imported when they are asked for: torch takes seconds, which not every command needs.
_HOMES = {"Policy": "deflow.policy", "load": "deflow.loading", "train": "deflow.notebook"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deflow' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
