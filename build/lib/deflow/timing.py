"""How long updates take in the smallest loop that computes them, and how such times are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import TypeVar

import torch

from deflow.agents.base import Agent
from deflow.types import Batch

Name = TypeVar("Name")


def seconds_of_updates(agent: Agent, stream: Iterable[Batch], context: AbstractContextManager | None = None) -> float:
    """Seconds of one pass over `stream` in the smallest loop that computes the same updates; losses in `context`."""
    optimizer = agent.configure_optimizers()
    started = time.perf_counter()
    for number, batch in enumerate(stream):
        agent.begin_update(number)
        agent.seed_noise("noise", number)
        with context or nullcontext():
            agent.update(optimizer, batch)
    return time.perf_counter() - started


def in_turns(measurements: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """`rounds` results of each measurement, after one that warms up.

    They take turns, so that a machine that slows down slows all of them; compare them by `ratio`.
    """
    results = [[measure() for measure in measurements.values()] for _ in range(rounds + 1)][1:]
    return {name: list(column) for name, column in zip(measurements, zip(*results, strict=True), strict=True)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def bfloat16_gain() -> float:
    """How many times as fast a product is in bfloat16 as in float32; far below 1 on a CPU without such products."""
    return product_seconds(torch.float32) / product_seconds(torch.bfloat16)


def product_seconds(dtype: torch.dtype, rows: int = 256, width: int = 512, repeats: int = 10) -> float:
    """Seconds of one product of a batch with a layer's weights, (rows, width) x (width, width); the median."""
    x, weights = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        x @ weights
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
