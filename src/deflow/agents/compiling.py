"""Losses fused by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deflow.agents.algorithm import Loss
from deflow.types import Batch

# Left alone, torch.compile's C++ computes a GELU anew in each pass of the layer normalisation over it; with this option
# it keeps what took so many operations. Code for a GPU, which is another, keeps the defaults.
FOR_CPU: dict[str, Any] = {"realize_opcount_threshold": 4}


def compiled(losses: Callable[[Batch, Any], Iterable[Loss]]) -> Callable[[Batch, Any], list[Loss]]:
    """`Algorithm.losses` that torch.compile makes faster, at its first call on a CPU and on a GPU."""

    def listed(batch: Batch, noise: Any) -> list[Loss]:
        return list(losses(batch, noise))

    # Code of its own: torch makes a few graphs of each, and all agents of a process would share them.
    listed.__code__ = listed.__code__.replace()
    on_cpu, elsewhere = torch.compile(listed, options=FOR_CPU), torch.compile(listed)
    return lambda batch, noise: (on_cpu if batch.rewards.is_cpu else elsewhere)(batch, noise)
