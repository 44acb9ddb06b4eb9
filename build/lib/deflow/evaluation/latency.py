"""How long a policy takes to decide."""

from __future__ import annotations

import time

import numpy as np

from deflow.policy import Policy, evaluation_mode

WARM_UP, CALLS = 20, 200


def latency(policy: Policy) -> dict[str, float]:
    """Milliseconds for one action in one state, including the copy to and from the device: median and 99th percentile.

    A chunk of actions counts as one.
    """
    generator = np.random.default_rng(0)
    milliseconds = []
    shape = (1, *policy.spec.observation_shape)
    with evaluation_mode(policy.agent):
        for _ in range(WARM_UP + CALLS):
            if policy.spec.image is None:
                observation: np.ndarray = generator.standard_normal(shape, dtype=np.float32)
            else:
                observation = generator.integers(256, size=shape, dtype=np.uint8)
            noise = policy.draw_noise(generator)[None]
            started = time.perf_counter()
            policy.plan(observation, noise)
            milliseconds.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.quantile(milliseconds[WARM_UP:], [0.5, 0.99])
    return {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99)}
