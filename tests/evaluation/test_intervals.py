from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from deflow.evaluation.intervals import bootstrap_interval, wilson_interval


def test_bootstrap_covers_the_mean() -> None:
    low, high = bootstrap_interval([0.0] * 25 + [1.0] * 25)
    # Normal approximation: 0.5 +- 1.96 * sqrt(0.25 / 50) = 0.36 to 0.64.
    assert low == pytest.approx(0.36, abs=0.03)
    assert high == pytest.approx(0.64, abs=0.03)
    assert bootstrap_interval([1.0] * 10) == (1.0, 1.0)


def test_wilsons_interval_is_never_a_point() -> None:
    assert wilson_interval(0, 50) == pytest.approx((0, 0.0713), abs=5e-5)
    assert wilson_interval(50, 50) == pytest.approx((0.9287, 1), abs=5e-5)
    assert all(wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1 for n in range(1, 1000))
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson_interval(0, 1) == pytest.approx((0, 0.7935), abs=5e-5)
    assert wilson_interval(2.5, 10)[0] < wilson_interval(3, 10)[0]


@pytest.mark.parametrize("episodes", [1, 7, 50, 400])
def test_wilsons_interval_is_scipys_and_its_mirror(episodes: int) -> None:
    for successes in range(0, episodes + 1, max(1, episodes // 7)):
        low, high = wilson_interval(successes, episodes)
        expected = binomtest(successes, episodes).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= low <= successes / episodes <= high <= 1
        assert low < high
        assert wilson_interval(episodes - successes, episodes) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("successes, episodes", [(0, 0), (-1, 10), (11, 10), (np.nan, 10)])
def test_what_is_no_share_has_no_interval(successes: float, episodes: int) -> None:
    with pytest.raises(ValueError, match="episode"):
        wilson_interval(successes, episodes)
