"""Whether two policies decide the same."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np

from deflow.evaluation.latency import random_observations
from deflow.policy import AnyPolicy
from deflow.types import Spec

AT_ONCE = 50  # observations
TOLERANCE = 1e-3  # of actions in [-1, 1]: far above rounding, far below what chooses another candidate


def parity(one: AnyPolicy, other: AnyPolicy, observations: np.ndarray) -> dict[str, float]:
    """How far apart two policies' actions are for the same observations and the same noise.

    Differences are between actions in [-1, 1], whatever the environment's units are.

    Args:
        one: in whose units they are compared.
        other: of the same sizes.
        observations: shape (count, *observation_shape), such as `random_states` gives, or `Remembering` has met.

    Returns:
        `observations`, their count; `max_difference` and `median_difference` over them (of each the largest over its
        actions), and `beyond_tolerance`, the share of them that differ by more than `tolerance`.
    """
    rng = np.random.default_rng(0)
    differences: list[float] = []
    with one.deciding(), other.deciding():
        for first in range(0, len(observations), AT_ONCE):
            seen = observations[first : first + AT_ONCE]
            noise = np.stack([one.draw_noise(rng) for _ in seen])
            a, b = (one.units.decided(policy.plan(seen, noise)) for policy in (one, other))
            differences += np.abs(a - b).reshape(len(seen), -1).max(1).tolist()
    return {
        "observations": len(observations),
        "max_difference": float(np.max(differences)),
        "median_difference": float(np.median(differences)),
        "tolerance": TOLERANCE,
        "beyond_tolerance": float(np.mean(~(np.array(differences) <= TOLERANCE))),  # NaN is beyond
    }


def random_states(policy: AnyPolicy, count: int) -> np.ndarray:
    """Observations in the environment's units, shape (count, *observation_shape).

    They are standard normal in the numbers that the networks see, or images of uniform noise.
    """
    seen = random_observations(policy.spec, count, np.random.default_rng(0))
    if policy.units.mean is None:
        return seen
    return (seen * np.asarray(policy.units.std) + np.asarray(policy.units.mean)).astype(np.float32)


class Remembering(AnyPolicy):
    """Decides as another policy does, and remembers in which states: some of them, all equally likely.

    Args:
        policy: that decides.
        most: states to remember.
    """

    def __init__(self, policy: AnyPolicy, most: int) -> None:
        super().__init__(0, policy.units)
        self._policy, self._most = policy, most
        self._met: list[np.ndarray] = []
        self._count, self._rng = 0, np.random.default_rng(0)

    @property
    def met(self) -> np.ndarray:
        """The states that are remembered, as the environment gave them, shape (count, *observation_shape)."""
        return np.stack(self._met)

    @property
    def spec(self) -> Spec:
        return self._policy.spec

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self._policy.noise_shape

    def plan(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        for observation in observations:
            self._count += 1
            if len(self._met) < self._most:
                self._met.append(observation.copy())
            elif (place := self._rng.integers(self._count)) < self._most:  # so that each has the same chance
                self._met[place] = observation.copy()
        return self._policy.plan(observations, noise)

    def foresee(self, observations: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        return self._policy.foresee(observations, noise)

    def deciding(self) -> AbstractContextManager[None]:
        return self._policy.deciding()
