"""Statistics over runs and tasks: what a table prints, how sure it is, and whether it agrees with a published one.

`values` are the scores of one task's seeds, one number a seed. `scores` are a sequence of `values`, one a task, and
tasks may have different numbers of seeds: `array.T` of an array of shape (seeds, tasks), or the values of a mapping
from tasks. Any unit will do if it is the same throughout, except where shares in [0, 1] are asked for.

"Agarwal" is Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021,
arXiv:2108.13264. Every function raises ValueError for what is empty, not a number or not of that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from deflow.evaluation.intervals import CONFIDENCE, DEVIATIONS, RESAMPLES, wilson_interval

Values = Sequence[float] | np.ndarray
Scores = Sequence[Values] | np.ndarray
Interval = tuple[float, float]
Verdict = Literal["inside", "above", "below"]

ENOUGH_SEEDS = 5  # of each task; with fewer the interval of a bootstrap is far too narrow to be called 95%


class Estimate(NamedTuple):
    """A mean over seeds and its interval, or None where there is none."""

    mean: float
    interval: Interval | None


def mean_and_deviation(scores: Scores) -> tuple[float, float | None]:
    """Mean and deviation as papers print them after "±", of one task or of several together.

    The mean is over tasks of the mean over seeds, so each task weighs the same. The deviation is over seeds of a seed's
    mean over tasks, with `ddof=0`, which is numpy's default. It is None for one seed, and where tasks have different
    numbers of seeds, since a seed has no mean over tasks there.

    Args:
        scores: with a seed at the same place in each task.
    """
    tasks = _tasks(scores)
    mean = float(np.mean([values.mean() for values in tasks]))
    seeds = {len(values) for values in tasks}
    if len(seeds) > 1 or seeds == {1}:
        return mean, None
    return mean, float(np.mean(tasks, axis=0).std())


def interquartile_mean(scores: Scores) -> float:
    """Mean of the middle half of all runs of all tasks together (Agarwal, section 4.3).

    A quarter of the runs, rounded down, is left out at each end, as in the paper's released code. A task with more
    seeds than another weighs more.
    """
    runs = np.sort(np.concatenate(_tasks(scores)))
    cut = len(runs) // 4
    return float(runs[cut : len(runs) - cut].mean())


def stratified_bootstrap(
    scores: Scores, statistic: Callable[[Sequence[np.ndarray]], float], seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval (95%) of `statistic`, seeds drawn again within each task (Agarwal, section 4.1).

    None if a task has one seed only, as nothing is known of its spread. With few seeds the interval is too narrow: the
    mean's variance comes out as (seeds - 1) / seeds of what it is, and it is a point where all seeds are equal.

    Args:
        scores: of any number of tasks.
        statistic: of scores in this module's form, such as `interquartile_mean`.
        seed: of the draws.
    """
    tasks = _tasks(scores)
    if any(len(values) == 1 for values in tasks):
        return None
    generator = np.random.default_rng(seed)
    drawn = [values[generator.integers(len(values), size=(RESAMPLES, len(values)))] for values in tasks]
    statistics = [statistic([values[i] for values in drawn]) for i in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return float(low), float(high)


def enough_seeds(scores: Scores) -> bool:
    """Whether every task has so many seeds that a bootstrap's interval is worth showing."""
    return all(len(values) >= ENOUGH_SEEDS for values in _tasks(scores))


def performance_profile(scores: Scores, thresholds: Values) -> np.ndarray:
    """Share of a task's runs with a score above each threshold, averaged over tasks; shape (thresholds,).

    The run-score distribution of Agarwal, section 4.2. Each task weighs the same.
    """
    levels = _numbers(thresholds, "thresholds")
    return np.mean([(values[:, None] > levels).mean(axis=0) for values in _tasks(scores)], axis=0)


def profile_band(scores: Scores, thresholds: Values) -> tuple[np.ndarray, np.ndarray] | None:
    """Pointwise 95% band of `performance_profile`, as `stratified_bootstrap` has it; None if a task has one seed only.

    Returns:
        Lower and upper bounds, each of shape (thresholds,).
    """
    tasks, levels = _tasks(scores), _numbers(thresholds, "thresholds")
    if any(len(values) == 1 for values in tasks):
        return None
    generator = np.random.default_rng(0)
    profiles = np.zeros((RESAMPLES, len(levels)))
    for values in tasks:
        drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
        profiles += (values[:, None] > levels)[drawn].mean(axis=1) / len(tasks)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(profiles, [tail, 1 - tail], axis=0)
    return low, high


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """Mean over tasks of P(X > Y) + P(X = Y) / 2, for a run of `x` and one of `y` (Agarwal, section 4.3).

    Raises:
        ValueError: if there are not as many tasks in `y` as in `x`; their seeds may differ in number.
    """
    ours, theirs = _tasks(x), _tasks(y)
    if len(ours) != len(theirs):
        raise ValueError(f"x has {len(ours)} tasks and y has {len(theirs)}: they must be the same tasks, in one order")
    return float(np.mean([(1 + _signs(*pair).mean()) / 2 for pair in zip(ours, theirs, strict=True)]))


def improvement_interval(x: Scores, y: Scores) -> Interval | None:
    """Interval (95%) of `probability_of_improvement`, as `stratified_bootstrap` has it.

    None if a task has one seed, or if every draw is the same: seeds drawn again never change sides that they did not
    change, and a width of 0 is not how well the probability is known.
    """
    pairs = list(zip(_tasks(x), _tasks(y), strict=True))
    if any(len(values) == 1 for pair in pairs for values in pair):
        return None
    generator = np.random.default_rng(0)
    better = np.zeros(RESAMPLES)
    for ours, theirs in pairs:
        left, right = (generator.integers(len(own), size=(RESAMPLES, len(own))) for own in (ours, theirs))
        drawn = _signs(ours, theirs)[left[:, :, None], right[:, None, :]]
        better += (1 + drawn.mean(axis=(1, 2))) / 2 / len(pairs)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(better, [tail, 1 - tail])
    return (float(low), float(high)) if low < high else None


def _signs(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1, 0 or -1 for each pair of a run of ours and one of theirs; shape (our runs, their runs)."""
    return np.sign(ours[:, None] - theirs)


def difference_interval(x: Values, y: Values) -> Interval | None:
    """Welch's t interval (95%) of the mean over seeds of `x` less that of `y`; None where a spread is not known."""
    from scipy.stats import t  # scipy's own test warns where the seeds of one are equal

    ours, theirs = _numbers(x, "x"), _numbers(y, "y")
    if min(len(ours), len(theirs)) < 2 or max(np.ptp(ours), np.ptp(theirs)) == 0:
        return None
    squares = np.array([values.var(ddof=1) / len(values) for values in (ours, theirs)])  # of the means' errors
    freedom = squares.sum() ** 2 / (squares**2 / [len(ours) - 1, len(theirs) - 1]).sum()
    difference, half = ours.mean() - theirs.mean(), t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(squares.sum())
    return float(difference - half), float(difference + half)


def seed_interval(values: Values) -> Interval | None:
    """Student's t interval (95%) of the mean over seeds, or None for one seed.

    It speaks of new seeds, where an interval over episodes speaks of new episodes of the same weights. It is not
    clipped: that of a share may end below 0 or above 1.
    """
    from scipy.stats import t  # a second to import, and tables alone need it

    sample = _numbers(values, "values")
    if len(sample) == 1:
        return None
    half = t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def interval(values: Values, episodes: int) -> Interval:
    """The interval that a table prints beside the mean over seeds, so that it never reads "0.00 to 0.00".

    Where seeds differ it is `seed_interval`. Where they are equal (all of them 0, say), or there is one, the spread
    over seeds is not known, and it is `wilson_interval` of the episodes of all seeds together. That one holds for these
    weights: for new seeds it is too narrow, and a table should say how many seeds there are.

    Args:
        values: each the share of successes of a seed, in [0, 1]; where seeds differ, a score of any unit.
        episodes: that each seed played, at least 1.

    Raises:
        ValueError: also where seeds do not differ and are no share.
    """
    sample = _numbers(values, "values")
    played = episodes * len(sample)
    between_seeds = None if np.allclose(sample, sample[0]) else seed_interval(sample)  # equal, but for the last bits
    return between_seeds or wilson_interval(sample.mean() * played, played)


def verdict(
    ours: Estimate, published_mean: float, published_deviation: float | None, published_seeds: int, tolerance: float
) -> Verdict:
    """Whether our result agrees with a published one: "inside" where intervals overlap, else on which side ours is.

    Ours is `ours.interval`, or its mean alone where that is None. The published one is the mean and, to both sides, the
    larger of the tolerance and 1.96 deviations of the mean, `published_deviation / sqrt(published_seeds)`. "inside"
    says that the two do not contradict each other, and not that they are the same: with few seeds our interval is wide,
    and nearly everything is inside.

    Args:
        ours: in the unit of the published numbers, as is the tolerance.
        published_mean: over seeds.
        published_deviation: over seeds; None where none is published, and only the tolerance counts.
        published_seeds: at least 1.
        tolerance: at least 0: how far two honest published runs of one and the same thing are apart, with other code,
            versions or machines, which no interval over seeds knows of.
    """
    if published_seeds < 1 or (published_deviation or 0) < 0 or tolerance < 0:
        raise ValueError(
            "a published result needs at least one seed, and neither deviation nor tolerance may be negative, "
            f"not {published_seeds}, {published_deviation} and {tolerance}"
        )
    low, high = ours.interval or (ours.mean, ours.mean)
    _numbers([low, high, published_mean, published_deviation or 0, tolerance], "what is compared")
    margin = max(DEVIATIONS * (published_deviation or 0) / np.sqrt(published_seeds), tolerance)
    if low > published_mean + margin:
        return "above"
    if high < published_mean - margin:
        return "below"
    return "inside"


def _tasks(scores: Scores) -> list[np.ndarray]:
    """Each task's values, shape (seeds,).

    Raises:
        ValueError: if there is no task, or a task without seeds or with what is no number.
    """
    if len(scores) == 0:
        raise ValueError("scores need at least one task")
    return [_numbers(values, f"the scores of task {place}") for place, values in enumerate(scores)]


def _numbers(values: Values, name: str) -> np.ndarray:
    """`values` as float64, shape (values,).

    Raises:
        ValueError: if there are none, or not in a single row, or one is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"{name} must be a row of at least one number, not of shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, not {numbers.tolist()}")
    return numbers
