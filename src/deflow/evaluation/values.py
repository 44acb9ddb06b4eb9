"""What an agent's action values are worth: beside the returns that held-out trajectories earned."""

from __future__ import annotations

import torch

from deflow.agents.base import Agent
from deflow.data.memory.transitions import Transitions
from deflow.seeding import torch_generator
from deflow.types import Lookahead

MEASURED = 4096  # transitions
AT_ONCE = 512  # of which values are asked for together


@torch.no_grad()
def measure_values(agent: Agent, held_out: Transitions, span: Lookahead, seed: int) -> dict[str, float | None] | None:
    """The data's action values beside the discounted returns from there on.

    The returns are those of whoever collected the data, and the values those of the agent's policy: where the policy is
    better they differ, by more than `bias` says of a good critic.

    Args:
        agent: in evaluation mode, where its weights are.
        held_out: trajectories that it was not trained on.
        span: of a transition.
        seed: of the choice of transitions.

    Returns:
        `correlation` (Pearson's; None where either is the same for all), `bias`, which is the mean value less the mean
        return, and the number of `transitions`; None for an agent without values.
    """
    generator = torch_generator(torch.device("cpu"), seed, "values")
    starts = held_out.chunk_starts(span.horizon)
    rows = starts[torch.randperm(len(starts), generator=generator)[:MEASURED]]
    found = []
    for some in rows.split(AT_ONCE):
        batch, _ = held_out.batch(some, span)
        of_some = agent.action_values(batch.observations.to(agent.device), batch.actions.to(agent.device))
        if of_some is None:
            return None
        found.append(of_some.cpu())
    values, returns = torch.cat(found).double(), held_out.returns_from(rows, span.discount).double()
    varies = values.std() > 0 and returns.std() > 0
    correlation = torch.corrcoef(torch.stack([values, returns]))[0, 1].item() if varies else None
    return {"correlation": correlation, "bias": (values - returns).mean().item(), "transitions": len(rows)}
