"""Whether two policies decide the same."""

from __future__ import annotations

import numpy as np

from deflow.evaluation.latency import random_observations
from deflow.policy import AnyPolicy

AT_ONCE = 50  # observations
TOLERANCE = 1e-3  # of actions in [-1, 1]: far above rounding, far below what chooses another candidate


def parity(one: AnyPolicy, other: AnyPolicy, observations: int) -> dict[str, float]:
    """How far apart two policies' actions are for the same observations and the same noise.

    The observations are random: standard normal in the numbers that the networks see, or images of uniform noise.
    Differences are between actions in [-1, 1], whatever the environment's units are.

    Args:
        one: in whose units they are compared.
        other: of the same sizes.
        observations: how many to compare.

    Returns:
        `max_difference` and `median_difference` over the observations (of each the largest over its actions), and
        `beyond_tolerance`, the share of the observations that differ by more than `tolerance`.
    """
    rng = np.random.default_rng(0)
    differences: list[float] = []
    with one.deciding(), other.deciding():
        while len(differences) < observations:
            rows = min(AT_ONCE, observations - len(differences))
            seen = random_observations(one.spec, rows, rng)
            if one.units.mean is not None:
                seen = (seen * np.asarray(one.units.std) + np.asarray(one.units.mean)).astype(np.float32)
            noise = np.stack([one.draw_noise(rng) for _ in range(rows)])
            a, b = (one.units.decided(policy.plan(seen, noise)) for policy in (one, other))
            differences += np.abs(a - b).reshape(rows, -1).max(1).tolist()
    return {
        "observations": observations,
        "max_difference": float(np.max(differences)),
        "median_difference": float(np.median(differences)),
        "tolerance": TOLERANCE,
        "beyond_tolerance": float(np.mean(~(np.array(differences) <= TOLERANCE))),  # NaN is beyond
    }
