"""GraphedUpdate: an agent's whole update as one launch of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch.optim import Optimizer

from deflow.agents.algorithm import Loss
from deflow.agents.base import Agent, whole
from deflow.one_launch import OneLaunch
from deflow.types import Batch, Drawn


class GraphedUpdate:
    """Draws the batch and the noise, computes losses and gradients, steps the optimizer and moves the targets.

    There is a recording for each kind of update, see `Agent.kind_of_update`.

    Args:
        agent: on a GPU, in the stage of the updates.
        optimizer: of that stage.
    """

    def __init__(self, agent: Agent, optimizer: Optimizer) -> None:
        self._of_kind: dict[tuple[tuple[str, ...], ...], OneLaunch[list[Loss]]] = {}
        self._agent, self._optimizer = agent, optimizer
        keep_rates_on(agent.device, optimizer)

    def __call__(self, batch: Batch | Drawn) -> list[Loss]:
        """The update at hand, see `Agent.update`; the next one of its kind overwrites the losses."""
        kind = self._agent.kind_of_update
        if kind not in self._of_kind:
            agent, optimizer = self._agent, self._optimizer
            update = Agent.update if agent.compiled else _update  # compiled losses have one gradient
            self._of_kind[kind] = OneLaunch(lambda batch: update(agent, optimizer, whole(batch)), agent.generators)
        return self._of_kind[kind](batch)


def _update(agent: Agent, optimizer: Optimizer, batch: Batch) -> list[Loss]:
    """An update as `Agent.update` makes it, the parts' losses and gradients side by side: none of them fills a GPU."""
    optimizer.zero_grad()
    found = _side_by_side(iter(agent.losses(batch, agent.next_noise(batch))))
    with torch.autocast(agent.device.type, enabled=False):
        return agent.step(optimizer, found)


def _side_by_side(losses: Iterator[Loss]) -> list[Loss]:
    """Every loss on a stream of its own, which begins when the loss before is known, and goes on to its gradient.

    So a part may use what another one's loss has computed. Memory is safe: what a stream frees only itself takes again,
    and it does nothing more before all streams have met.
    """
    meeting = torch.cuda.current_stream()
    found: list[Loss] = []
    streams: list[torch.cuda.Stream] = []
    known = meeting.record_event()
    while True:
        stream = _stream_of(len(found), torch.cuda.current_device())
        stream.wait_event(known)
        with torch.cuda.stream(stream):
            one = next(losses, None)
            if one is None:
                meeting.wait_stream(stream)
                break
            known = stream.record_event()
            with torch.autocast("cuda", enabled=False):
                one[1].backward()
        found.append(one)
        streams.append(stream)
    for stream in streams:
        meeting.wait_stream(stream)
    return found


@cache
def _stream_of(part: int, device: int) -> torch.cuda.Stream:
    """Always the same: libraries keep memory for each stream that they have seen."""
    return torch.cuda.Stream(device)


def keep_rates_on(device: torch.device, optimizer: Optimizer) -> None:
    """Hold the learning rates as tensors: a number would be recorded as it is, whatever a schedule makes of it.

    A checkpoint brings along how its optimizer was made, which may have been elsewhere.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group["capturable"] = device.type == "cuda"
