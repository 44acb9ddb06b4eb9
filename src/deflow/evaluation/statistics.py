"""Summaries of episodes, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deflow.evaluation.intervals import bootstrap_interval, wilson_interval
from deflow.evaluation.rollout import Episode


def summarise(episodes: Sequence[Episode], score: Callable[[float], float | None] = lambda _: None) -> dict[str, float]:
    """Means of success, return, length and path error with the ends of their 95% intervals (such as `success_low`).

    Success is a share, whose interval is Wilson's: a bootstrap's would be a point where no episode succeeds, or each.
    So is a score that is nothing but success in percent, as D4RL's of an antmaze.

    There is no success or path error if an episode has none, and no score without one for every return.

    Args:
        episodes: at least one.
        score: the normalised score of a return, or None where there is none.
    """
    columns: dict[str, list[float | None]] = {
        "success": [episode.success for episode in episodes],
        "return": [episode.episode_return for episode in episodes],
        "length": [float(episode.length) for episode in episodes],
        "score": [score(episode.episode_return) for episode in episodes],
        "path_error": [episode.path_error for episode in episodes],
    }
    measured = {name: [value for value in values if value is not None] for name, values in columns.items()}
    measured = {name: values for name, values in measured.items() if len(values) == len(episodes)}
    summary: dict[str, float] = {"episodes": float(len(episodes))}
    for name, values in measured.items():
        low, high = _interval(values, name, measured.get("success"))
        summary |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
    return summary


def _interval(values: Sequence[float], name: str, successes: Sequence[float] | None) -> tuple[float, float]:
    scale = {"success": 1, "score": 100}.get(name)
    if scale is None or successes is None or list(values) != [scale * success for success in successes]:
        return bootstrap_interval(values)
    low, high = wilson_interval(sum(successes), len(successes))
    return scale * low, scale * high
