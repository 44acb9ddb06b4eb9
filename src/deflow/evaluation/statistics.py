"""Summaries of episodes, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deflow.evaluation.rollout import Episode

RESAMPLES = 2000
CONFIDENCE = 0.95


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval (95%) of the mean of `values`."""
    sample = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(sample), size=(RESAMPLES, len(sample)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sample[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def summarise(episodes: Sequence[Episode], score: Callable[[float], float | None] = lambda _: None) -> dict[str, float]:
    """Means of success, return and length with the ends of their 95% intervals (`success_low`, `success_high`, ...).

    Args:
        episodes: at least one.
        score: the normalised score of a return, or None where there is none; if there is, it is summarised too.
    """
    columns = {
        "success": [episode.success for episode in episodes],
        "return": [episode.episode_return for episode in episodes],
        "length": [float(episode.length) for episode in episodes],
    }
    scores = [score(episode.episode_return) for episode in episodes]
    if None not in scores:
        columns["score"] = [value for value in scores if value is not None]
    summary: dict[str, float] = {"episodes": float(len(episodes))}
    for name, values in columns.items():
        low, high = bootstrap_interval(values)
        summary |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
    return summary
