"""Statistics over runs and tasks: worked examples, and what holds for any scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, t, trim_mean, ttest_ind

from deflow.evaluation.intervals import wilson_interval
from deflow.reproduction.statistics import (
    Estimate,
    Values,
    difference_interval,
    enough_seeds,
    improvement_interval,
    interquartile_mean,
    interval,
    mean_and_deviation,
    performance_profile,
    probability_of_improvement,
    profile_band,
    seed_interval,
    stratified_bootstrap,
    verdict,
)

UNEQUAL = [[0.0, 1.0], [0.5], [0.25, 0.5, 0.75]]


def some_scores(seed: int, tasks: int = 5) -> list[np.ndarray]:
    """Scores of 2 to 8 seeds a task, with ties."""
    generator = np.random.default_rng(seed)
    return [generator.integers(11, size=generator.integers(2, 9)) / 10 for _ in range(tasks)]


def mean(scores: object) -> float:
    return mean_and_deviation(scores)[0]


def test_mean_and_deviation_are_of_seeds_that_are_averaged_over_tasks() -> None:
    assert mean_and_deviation([[1, 3]]) == (2, 1)
    assert mean_and_deviation([[1, 3], [3, 1]]) == (2, 0)  # each seed's mean is 2
    assert mean_and_deviation([[1, 3], [3, 9]]) == (4, 2)
    scores = np.random.default_rng(0).normal(size=(8, 5))  # seeds, tasks
    assert mean_and_deviation(scores.T) == pytest.approx((scores.mean(), scores.mean(axis=1).std()))


def test_there_is_no_deviation_of_one_seed_or_of_seeds_that_are_not_complete() -> None:
    assert mean_and_deviation([[0.5]]) == (0.5, None)
    assert mean_and_deviation([[0.25], [0.75]]) == (0.5, None)
    assert mean_and_deviation(UNEQUAL) == (0.5, None)
    assert mean_and_deviation([[0, 0, 0], [3]]) == (1.5, None)  # each task weighs the same
    assert mean_and_deviation([[0, 0, 0]]) == (0, 0)


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert interquartile_mean([np.arange(8)]) == 3.5  # 2, 3, 4, 5
    assert interquartile_mean([[7, 0, 100], [3, 5, 4, 2], [-50]]) == 3.5
    assert interquartile_mean([[1, 2, 6]]) == 3  # no quarter to leave out
    assert interquartile_mean([[0.5]]) == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_the_interquartile_mean_is_a_trimmed_one_and_moves_with_the_scores(seed: int) -> None:
    scores = some_scores(seed)
    iqm = interquartile_mean(scores)
    assert iqm == pytest.approx(trim_mean(np.concatenate(scores), 0.25))
    assert interquartile_mean([2 * values + 1 for values in scores]) == pytest.approx(2 * iqm + 1)


def test_the_bootstrap_draws_seeds_within_their_task() -> None:
    assert stratified_bootstrap([[0, 0, 0], [1, 1]], mean) == (0.5, 0.5)  # tasks differ, seeds do not
    assert stratified_bootstrap([[0, 1]], mean) == (0, 1)
    sizes: set[tuple[int, ...]] = set()

    def noting(scores: list[np.ndarray]) -> float:
        sizes.add(tuple(len(values) for values in scores))
        assert scores[0].max() < 2 <= scores[1].min()
        return mean(scores)

    stratified_bootstrap([[0, 1], [2, 3, 4]], noting)
    assert sizes == {(2, 3)}


def test_the_bootstrap_follows_from_its_seed_and_knows_nothing_of_one_seed() -> None:
    scores = some_scores(0)
    first, again, other = (stratified_bootstrap(scores, interquartile_mean, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert stratified_bootstrap(UNEQUAL, mean) is None


def test_a_bootstrap_needs_seeds_of_every_task() -> None:
    assert enough_seeds([range(5), range(6)])
    assert not enough_seeds([range(5), range(4)])


def test_the_bootstrap_covers_and_shrinks() -> None:
    generator = np.random.default_rng(0)
    widths = {}
    for seeds in (5, 20):
        low, high = np.transpose(
            [stratified_bootstrap(generator.normal(size=(2, seeds)), np.mean, seed) for seed in range(50)]
        )
        widths[seeds] = np.mean(high - low)
        assert widths[seeds] == pytest.approx(2 * 1.96 * np.sqrt((seeds - 1) / seeds / (2 * seeds)), rel=0.1)
        assert 0.8 < np.mean((low <= 0) & (high >= 0)) < 1
    assert widths[20] < 0.6 * widths[5]


def test_a_performance_profile_counts_runs_above_a_threshold() -> None:
    assert performance_profile([[0, 0.5, 1, 1]], [-1, 0, 0.5, 1]).tolist() == [1, 0.75, 0.5, 0]
    assert performance_profile([[0, 0, 0, 0], [1]], [0.5]).tolist() == [0.5]  # each task weighs the same


def test_the_band_of_a_profile_is_what_the_bootstrap_says_at_each_threshold() -> None:
    scores, levels = [[0.1, 0.5, 0.9, 0.4], [0.2, 0.6]], [0.0, 0.45, 0.7, 1.0]
    band = profile_band(scores, levels)
    assert band is not None
    for place, level in enumerate(levels):
        expected = stratified_bootstrap(scores, lambda drawn, at=level: performance_profile(drawn, [at])[0])
        assert (band[0][place], band[1][place]) == pytest.approx(expected, abs=0.13)  # one run of a task of four
    assert profile_band([[0.5], [0.1, 0.2]], levels) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_performance_profile_falls_from_1_to_0_over_the_mean(seed: int) -> None:
    scores = some_scores(seed)
    thresholds = np.linspace(-0.0005, 1.0005, 1002)
    profile = performance_profile(scores, thresholds)
    assert (np.diff(profile) <= 0).all()
    assert (profile[0], profile[-1]) == (1, 0)
    assert profile[1:].mean() == pytest.approx(mean(scores), abs=2e-3)  # the area below it


def test_probability_of_improvement_counts_pairs_and_half_the_ties() -> None:
    assert probability_of_improvement([[1, 2]], [[0]]) == 1
    assert probability_of_improvement([[0]], [[1, 2]]) == 0
    assert probability_of_improvement([[0, 2]], [[1, 2]]) == 0.375  # of four pairs one is above and one a tie
    assert probability_of_improvement([[1], [0]], [[0, 0, 0], [1]]) == 0.5  # by tasks


@pytest.mark.parametrize("seed", range(10))
def test_probability_of_improvement_is_antisymmetric(seed: int) -> None:
    x, y = some_scores(seed), some_scores(seed + 100)
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x, y) == pytest.approx(1 - probability_of_improvement(y, x))
    pairs = [mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y, strict=True)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(pairs))


def test_the_interval_of_an_improvement_is_what_the_bootstrap_says() -> None:
    x, y = (
        [[0.1, 0.5, 0.9, 0.4, 0.3], [0.2, 0.6, 0.5, 0.1, 0.9]],
        [[0.2, 0.3, 0.5, 0.1, 0.6], [0.3, 0.4, 0.1, 0.0, 0.2]],
    )
    expected = stratified_bootstrap([*x, *y], lambda drawn: probability_of_improvement(drawn[:2], drawn[2:]))
    found, mirrored = improvement_interval(x, y), improvement_interval(y, x)
    assert found == pytest.approx(expected, abs=0.03)
    assert mirrored is not None
    assert found == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=0.03)
    assert improvement_interval([[1]], [[1, 2]]) is None
    assert improvement_interval([[6, 7, 8, 9, 9]], [[1, 2, 3, 4, 5]]) is None  # 1 in every draw


def test_the_interval_of_a_difference_is_welchs() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        x, y = generator.normal(3, 2, size=3), generator.normal(1, 1, size=4)
        found = difference_interval(x, y)
        assert found == pytest.approx(tuple(ttest_ind(x, y, equal_var=False).confidence_interval(0.95)))
        assert found is not None
        covered.append(found[0] <= 2 <= found[1])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)
    assert difference_interval([1, 1], [0, 0]) is None
    assert difference_interval([1], [0, 2]) is None
    assert difference_interval([1, 1], [0, 2]) is not None


def test_probability_of_improvement_is_over_the_same_tasks() -> None:
    with pytest.raises(ValueError, match="x has 1 tasks and y has 2"):
        probability_of_improvement([[1]], [[1], [2]])


def test_the_interval_over_seeds_is_students() -> None:
    assert seed_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)))
    assert seed_interval([0, 1]) == pytest.approx((0.5 - 12.706205 / 2, 0.5 + 12.706205 / 2))  # nothing is clipped
    assert seed_interval([0, 0]) == (0, 0)
    assert seed_interval([0.5]) is None


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_interval_over_seeds_covers_and_is_scipys(seeds: int) -> None:
    samples = np.random.default_rng(seeds).normal(1, 2, size=(400, seeds))
    intervals = [seed_interval(values) for values in samples]
    expected = t.interval(0.95, seeds - 1, samples[0].mean(), samples[0].std(ddof=1) / np.sqrt(seeds))
    assert intervals[0] == pytest.approx(expected)
    assert np.mean([low <= 1 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.03)


def test_a_tables_interval_is_over_seeds_if_they_differ_and_else_over_all_their_episodes() -> None:
    assert interval([0.0, 0.5, 0.25], 50) == seed_interval([0.0, 0.5, 0.25])
    assert interval([0.0, 0.0], 25) == wilson_interval(0, 50)
    assert interval([1.0, 1.0, 1.0], 10) == wilson_interval(30, 30)
    assert interval([0.5], 50) == wilson_interval(25, 50)
    assert interval([0.1 + 0.2, 0.3], 10) == pytest.approx(wilson_interval(6, 20))  # equal, but for the last bits
    assert interval([40.0, 60.0], 10) == seed_interval([40.0, 60.0])  # a score of any unit


@pytest.mark.parametrize("values, episodes", [([50.0], 10), ([-0.5, -0.5], 10), ([0.5], 0)])
def test_without_a_spread_a_tables_interval_needs_shares_of_episodes(values: Values, episodes: int) -> None:
    with pytest.raises(ValueError, match="episode"):
        interval(values, episodes)


def test_a_verdict_says_on_which_side_of_the_published_interval_ours_is() -> None:
    # the published interval: 0.5 +- 1.96 * 0.1 / sqrt(4) is from 0.402 to 0.598
    assert verdict(Estimate(0.7, (0.59, 0.81)), 0.5, 0.1, 4, 0.05) == "inside"
    assert verdict(Estimate(0.7, (0.60, 0.80)), 0.5, 0.1, 4, 0.05) == "above"
    assert verdict(Estimate(0.3, (0.19, 0.41)), 0.5, 0.1, 4, 0.05) == "inside"
    assert verdict(Estimate(0.3, (0.21, 0.39)), 0.5, 0.1, 4, 0.05) == "below"
    assert verdict(Estimate(0.5, (-9, 9)), 0.5, 0.1, 4, 0) == "inside"


def test_a_verdict_allows_for_honest_runs_apart() -> None:
    above = Estimate(0.7, (0.65, 0.75))
    assert verdict(above, 0.5, 0.1, 4, 0.2) == "inside"
    assert verdict(above, 0.5, None, 4, 0.2) == "inside"
    assert verdict(above, 0.5, None, 4, 0.1) == "above"
    assert verdict(Estimate(0.5, None), 0.5, 0, 4, 0) == "inside"  # a mean alone
    assert verdict(Estimate(0.61, None), 0.5, None, 4, 0.1) == "above"
    assert verdict(Estimate(0.39, None), 0.5, None, 4, 0.1) == "below"


@pytest.mark.parametrize("seed", range(10))
def test_a_verdict_turns_with_the_signs_and_not_with_the_unit(seed: int) -> None:
    mean, published, width, deviation = np.random.default_rng(seed).uniform(size=4)
    opposite = {"inside": "inside", "above": "below", "below": "above"}
    found = verdict(Estimate(mean, (mean - width / 4, mean + width / 4)), published, deviation / 4, 8, 0.02)
    mirrored = verdict(Estimate(-mean, (-mean - width / 4, -mean + width / 4)), -published, deviation / 4, 8, 0.02)
    percent = Estimate(100 * mean, (100 * mean - 25 * width, 100 * mean + 25 * width))
    assert mirrored == opposite[found]
    assert verdict(percent, 100 * published, 25 * deviation, 8, 2) == found


@pytest.mark.parametrize("seeds, deviation, tolerance", [(0, 0.1, 0.1), (4, -0.1, 0.1), (4, None, -0.1)])
def test_a_published_result_that_cannot_be_is_refused(seeds: int, deviation: float | None, tolerance: float) -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        verdict(Estimate(0.5, None), 0.5, deviation, seeds, tolerance)


OF_SCORES = [
    mean_and_deviation,
    interquartile_mean,
    lambda scores: stratified_bootstrap(scores, mean),
    lambda scores: performance_profile(scores, [0.5]),
    lambda scores: probability_of_improvement(scores, scores),
]


@pytest.mark.parametrize("function", OF_SCORES)
def test_scores_are_at_least_one_number_for_each_of_at_least_one_task(function: Callable) -> None:
    for wrong, message in [
        ([], "at least one task"),
        ([[1.0], []], "the scores of task 1 must be a row of at least one number"),
        ([1.0, 2.0], "the scores of task 0 must be a row"),
        ([[[1.0]]], "the scores of task 0 must be a row"),
        ([[1.0, np.nan]], "must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(wrong)


def test_values_are_at_least_one_number_too() -> None:
    for function in (seed_interval, lambda values: interval(values, 50), lambda it: performance_profile([[1.0]], it)):
        with pytest.raises(ValueError, match="at least one number"):
            function([])
        with pytest.raises(ValueError, match="must be finite"):
            function([np.inf])
    with pytest.raises(ValueError, match="what is compared must be finite"):
        verdict(Estimate(np.nan, None), 0.5, 0.1, 4, 0.1)
