"""How long a policy takes to decide."""

from __future__ import annotations

import time

import numpy as np

from deflow.policy import AnyPolicy
from deflow.types import Spec

WARM_UP, CALLS = 20, 200
PATIENCE_SECONDS = 2.0, 10.0  # of warming up and of measuring, after which so slow a policy is called no more


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

    def timed(calls: int, patience: float) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < calls and sum(seconds) < patience:
            observations = random_observations(policy.spec, rows, generator)
            noise = np.stack([policy.draw_noise(generator) for _ in range(rows)])
            started = time.perf_counter()
            policy.plan(observations, noise)
            seconds.append(time.perf_counter() - started)
        return seconds

    with policy.deciding():
        timed(WARM_UP, PATIENCE_SECONDS[0])
        seconds = timed(CALLS, PATIENCE_SECONDS[1])
    p50, p99 = 1e3 * np.quantile(seconds, [0.5, 0.99])
    return {"latency_ms_p50": float(p50), "latency_ms_p99": float(p99), "latency_calls": len(seconds)}


def random_observations(spec: Spec, rows: int, rng: np.random.Generator) -> np.ndarray:
    """States of standard normal numbers, or images of uniform ones, shape (rows, *observation_shape)."""
    shape = (rows, *spec.observation_shape)
    if spec.image is None:
        return rng.standard_normal(shape, dtype=np.float32)
    return rng.integers(256, size=shape, dtype=np.uint8)
