"""How long a policy takes to decide."""

from __future__ import annotations

import time

import numpy as np
import torch

from deflow.agents.base import Agent

WARM_UP, CALLS = 20, 200


@torch.no_grad()
def latency(agent: Agent) -> dict[str, float]:
    """Milliseconds for one action in one state, including the copy to and from the device: median and 99th percentile.

    A chunk of actions counts as one.
    """
    generator = np.random.default_rng(0)
    milliseconds = []
    for _ in range(WARM_UP + CALLS):
        shape = (1, *agent.spec.observation_shape)
        if agent.spec.image is None:
            observation: np.ndarray = generator.standard_normal(shape, dtype=np.float32)
        else:
            observation = generator.integers(256, size=shape, dtype=np.uint8)
        z = generator.standard_normal((1, agent.candidates, agent.spec.action_dim), dtype=np.float32)
        started = time.perf_counter()
        agent.act(torch.from_numpy(observation).to(agent.device), torch.from_numpy(z).to(agent.device)).cpu()
        milliseconds.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.quantile(milliseconds[WARM_UP:], [0.5, 0.99])
    return {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99)}
