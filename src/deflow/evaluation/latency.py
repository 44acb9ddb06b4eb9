"""How long a policy takes to decide."""

from __future__ import annotations

import time

import numpy as np

from deflow.policy import AnyPolicy
from deflow.types import Spec

WARM_UP, CALLS = 20, 200
PATIENCE_SECONDS = 20.0  # after which so slow a policy has been called often enough


def latency(policy: AnyPolicy, rows: int = 1) -> dict[str, float]:
    """Milliseconds for one decision, including the copy to and from the device, and of how many calls they are.

    A chunk of actions counts as one. A slow policy is called less often: of fewer than 100 calls the 99th percentile is
    all but the slowest.

    Args:
        policy: to measure.
        rows: states side by side that are decided at once.

    Returns:
        `latency_ms_p50` and `latency_ms_p99`, the median and the 99th percentile, and `latency_calls`.
    """
    generator = np.random.default_rng(0)
    milliseconds: list[float] = []
    with policy.deciding():
        while len(milliseconds) < WARM_UP + CALLS and sum(milliseconds[WARM_UP:]) < 1e3 * PATIENCE_SECONDS:
            observations = random_observations(policy.spec, rows, generator)
            noise = np.stack([policy.draw_noise(generator) for _ in range(rows)])
            started = time.perf_counter()
            policy.plan(observations, noise)
            milliseconds.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.quantile(milliseconds[WARM_UP:], [0.5, 0.99])
    return {
        "latency_ms_p50": float(p50),
        "latency_ms_p99": float(p99),
        "latency_calls": len(milliseconds[WARM_UP:]),
    }


def random_observations(spec: Spec, rows: int, rng: np.random.Generator) -> np.ndarray:
    """States of standard normal numbers, or images of uniform ones, shape (rows, *observation_shape)."""
    shape = (rows, *spec.observation_shape)
    if spec.image is None:
        return rng.standard_normal(shape, dtype=np.float32)
    return rng.integers(256, size=shape, dtype=np.uint8)
