"""Intervals (95%) of means and of shares."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
DEVIATIONS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # 1.96, where a normal distribution's interval ends


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval (95%) of the mean of `values`."""
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sample[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(successes: float, episodes: int) -> tuple[float, float]:
    """Wilson's score interval (95%) of a share of successes, within [0, 1] and never a point (Wilson, 1927).

    Args:
        successes: from 0 to `episodes`; no whole number if a share is a mean of several evaluations.
        episodes: at least 1, and independent of each other.
    """
    if episodes < 1:
        raise ValueError(f"an interval needs at least one episode, not {episodes}")
    if not 0 <= successes <= episodes:
        raise ValueError(f"successes must be from 0 to the {episodes} episodes, not {successes}")
    square = DEVIATIONS**2
    centre = (successes + square / 2) / (episodes + square)
    half = DEVIATIONS * np.sqrt(successes * (episodes - successes) / episodes + square / 4) / (episodes + square)
    share = successes / episodes  # which is within, but for the last bits where it is 0 or 1
    return max(min(float(centre - half), share), 0.0), min(max(float(centre + half), share), 1.0)
