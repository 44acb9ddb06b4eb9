"""The little that losses and evaluation need to know about other ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 outside DDP."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, also before the ranks have met, as the launcher's environment tells."""
    return getattr(rank_zero_only, "rank", 0) == 0


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a detached statistic over all ranks; the value itself outside DDP."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def max_over_ranks(value: Tensor) -> Tensor:
    """Largest of a detached statistic over all ranks; the value itself outside DDP."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank; `[value]` outside DDP."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def of_main_process(value: Any) -> Any:
    """The main process's value, on every rank."""
    return gather_objects(value)[0]


def lost_a_process(error: RuntimeError) -> bool:
    """Whether what failed is the exchange with a process that has ended."""
    return world_size() > 1 and (isinstance(error, dist.DistBackendError) or "by peer" in str(error))
