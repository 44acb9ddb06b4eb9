"""The smallest loop that computes a stage's updates, to time them, and what follows from its timing."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch

from deflow.agents.base import Agent
from deflow.types import Batch

log = logging.getLogger(__name__)

FLOAT32, BFLOAT16 = "32-true", "bf16-mixed"  # Lightning's names
ROUNDS = 5  # of each precision, in turns; the first warms up


def bare_seconds(agent: Agent, stream: Iterable[Batch], context: AbstractContextManager | None = None) -> float:
    """Seconds of one pass over `stream` in the smallest loop that computes the same updates; losses in `context`."""
    optimizer = agent.configure_optimizers()
    started = time.perf_counter()
    for number, batch in enumerate(stream):
        with context or nullcontext():
            terms = agent.losses(batch, agent.noise(batch, "noise", number))
            loss = torch.stack([loss for _, loss, _ in terms]).sum()
        optimizer.zero_grad()
        loss.backward()
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()
    return time.perf_counter() - started


def faster_precision(agent: Agent, stream: Iterable[Batch]) -> str:
    """`bf16-mixed` if a copy of `agent` passes over `stream` faster in it than in float32, else `32-true`."""
    agent = copy.deepcopy(agent)
    agent.begin_stage("precision", "all", first_step=0)
    seconds: dict[str, list[float]] = {FLOAT32: [], BFLOAT16: []}
    for _ in range(ROUNDS):
        for precision, measured in seconds.items():
            context = torch.autocast("cpu", torch.bfloat16, enabled=precision == BFLOAT16)
            measured.append(bare_seconds(agent, stream, context))
    pairs = zip(seconds[FLOAT32][1:], seconds[BFLOAT16][1:], strict=True)
    ratio = median(float32 / bfloat16 for float32, bfloat16 in pairs)
    chosen = BFLOAT16 if ratio > 1 else FLOAT32
    log.info("precision %s: an update in bf16-mixed is %.2f times as fast as in 32-true here", chosen, ratio)
    return chosen
