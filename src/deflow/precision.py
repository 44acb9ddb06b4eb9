"""Precision: of float32 products, and which one makes the faster updates on this machine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable

import torch

from deflow.agents.base import Agent
from deflow.timing import bfloat16_gain, in_turns, ratio, seconds_of_updates
from deflow.types import Batch

log = logging.getLogger(__name__)

FLOAT32, BFLOAT16 = "32-true", "bf16-mixed"  # Lightning's names
ROUNDS = 4  # in which precisions are compared


def set_product_precision(precision: str) -> None:
    """Compute products of float32, those of convolutions among them, as `torch.set_float32_matmul_precision` says."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # torch lets convolutions have it unless told not to


def faster_precision(agent: Agent, stream: Iterable[Batch]) -> str:
    """`bf16-mixed` if a copy of `agent` passes over `stream` faster in it than in float32, else `32-true`."""
    # A CPU without bfloat16 products would take minutes for the updates: there one product says enough.
    gain = bfloat16_gain()
    if gain < 1:
        log.info("precision %s: a product in bfloat16 is %.2f times as fast as in float32 here", FLOAT32, gain)
        return FLOAT32
    agent = copy.deepcopy(agent)
    agent.begin_stage("precision", "all", first_step=0)
    autocast = torch.autocast("cpu", torch.bfloat16)
    seconds = in_turns(
        {
            FLOAT32: lambda: seconds_of_updates(agent, stream),
            BFLOAT16: lambda: seconds_of_updates(agent, stream, autocast),
        },
        ROUNDS,
    )
    gain = ratio(seconds[FLOAT32], seconds[BFLOAT16])
    chosen = BFLOAT16 if gain > 1 else FLOAT32
    log.info("precision %s: an update in bf16-mixed is %.2f times as fast as in 32-true here", chosen, gain)
    return chosen
