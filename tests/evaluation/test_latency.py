"""What is measured of a policy that is quick, and of one that is slow."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from deflow.evaluation import latency as module
from deflow.evaluation.latency import CALLS, WARM_UP, latency
from deflow.types import Spec


class Clocked:
    """Decides within so many seconds, by a clock of its own."""

    spec = Spec(3, 2)

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, 0

    def deciding(self) -> Any:
        return nullcontext()

    def draw_noise(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal(2)

    def plan(self, observations: np.ndarray, noise: np.ndarray) -> None:
        assert (observations.shape, noise.shape) == ((4, 3), (4, 2))
        self.now += self.seconds
        self.calls += 1


@pytest.mark.parametrize(("seconds", "warm_up", "calls"), [(0.001, WARM_UP, CALLS), (0.9, 3, 12), (60.0, 1, 1)])
def test_so_slow_a_policy_is_called_less_often(
    seconds: float, warm_up: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Any = Clocked(seconds)
    monkeypatch.setattr(module.time, "perf_counter", lambda: policy.now)
    result = latency(policy, rows=4)
    assert (policy.calls, result["latency_calls"]) == (warm_up + calls, calls)
    assert result["latency_ms_p50"] == pytest.approx(1e3 * seconds)
    assert result["latency_ms_p99"] == pytest.approx(1e3 * seconds)
