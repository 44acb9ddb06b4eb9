"""IAV, the intrinsic action variance: how wide the behaviour in a data set is where the state is (nearly) the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deflow.data.scales import standardised
from deflow.errors import UserError
from deflow.seeding import fold_seed

BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class ActionVariance:
    """Variances of actions at (nearly) equal states, averaged over states.

    `per_dimension` has one number an action dimension, `mean` is their mean, `interval` its 95% bootstrap interval over
    the states; all in squared action units. `std` is the mean over dimensions of the standard deviations.
    """

    per_dimension: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    std: float
    states: int

    @classmethod
    def of_states(cls, variances: np.ndarray, seed: int = 0) -> ActionVariance:
        """From the variances at each state, shape (states, action_dim)."""
        per_dimension = variances.mean(0, dtype=np.float64)
        at_state = variances.mean(1, dtype=np.float64)
        rng = np.random.default_rng(fold_seed(seed, "bootstrap"))
        means = [rng.choice(at_state, len(at_state)).mean() for _ in range(BOOTSTRAP_SAMPLES)]
        low, high = np.quantile(means, [0.025, 0.975])
        return cls(
            per_dimension=tuple(per_dimension.tolist()),
            mean=float(per_dimension.mean()),
            interval=(float(low), float(high)),
            std=float(np.sqrt(per_dimension).mean()),
            states=len(variances),
        )


def intrinsic_action_variance(
    states: np.ndarray,
    actions: np.ndarray,
    neighbours: int = 5,
    sample: int | None = None,
    include_self: bool = False,
    standardise: bool = True,
    seed: int = 0,
) -> ActionVariance:
    """The unbiased variance of the actions at each state's nearest neighbours, averaged over states.

    The search is exact. Source: DeFlow (arXiv 2601.10471), which leaves open what the arguments below settle.

    Args:
        states: shape (rows, observation_dim).
        actions: taken in them, shape (rows, action_dim).
        neighbours: k, at least 2.
        sample: states to average over, drawn without replacement; None takes all. Neighbours come from all states.
        include_self: whether a state is the first of its own k neighbours.
        standardise: divide every observation dimension by its standard deviation before distances are taken.
        seed: of the sample and the bootstrap.

    Raises:
        UserError: if `neighbours` is below 2 or there are not enough states.
    """
    if neighbours < 2:
        raise UserError(f"a variance needs at least 2 neighbours, got {neighbours}")
    if len(states) <= neighbours:
        raise UserError(f"{neighbours} neighbours need more than {len(states)} states")
    points = np.asarray(states, np.float32)
    if standardise:
        points = standardised(points)
    rng = np.random.default_rng(fold_seed(seed, "sample"))
    rows = np.arange(len(points)) if sample is None else rng.permutation(len(points))[:sample]
    from sklearn.neighbors import NearestNeighbors  # a second to import, for few runs

    # Brute force: trees lose to it above a handful of dimensions.
    search = NearestNeighbors(n_neighbors=neighbours + 1, algorithm="brute").fit(points)
    found = search.kneighbors(points[rows], return_distance=False)
    if include_self:
        found = np.column_stack([rows, _without_self(found, rows)[:, : neighbours - 1]])
    else:
        found = _without_self(found, rows)[:, :neighbours]
    return ActionVariance.of_states(np.asarray(actions)[found].var(axis=1, ddof=1), seed)


def _without_self(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Each row's neighbours in their order, itself (if it is among them: twins may crowd it out) moved to the end."""
    order = np.argsort(found == rows[:, None], axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)
