"""How much numbers vary, in whatever units they are."""

from __future__ import annotations

import numpy as np

# Numbers that vary by no more are taken to be constant: what a simulator's arithmetic leaves, and what single precision
# leaves, as a share of the largest of them.
LEAST_DEVIATION = 1e-9
ROUNDING = 2.0**-23


def deviations(values: np.ndarray) -> np.ndarray:
    """Standard deviations along the first axis, shape (size,); 0 for what does not vary but by rounding."""
    found = centred(values).std(0)
    return np.where(found > rounding(values), found, 0.0)


def rounding(values: np.ndarray) -> np.ndarray:
    """What of a deviation of such numbers, or of their differences, may be rounding, shape (size,)."""
    return np.maximum(ROUNDING * np.abs(values).max(0), LEAST_DEVIATION)


def standardised(points: np.ndarray) -> np.ndarray:
    """Points as distances between them are taken: in standard deviations from their mean, float32.

    What does not vary is 0 in all of them: its size would take the distances' precision.

    Args:
        points: shape (rows, size).
    """
    points = np.asarray(points, np.float32)
    scale = deviations(points)
    return centred(points) / np.where(scale > 0, scale, np.inf).astype(np.float32)


def centred(values: np.ndarray) -> np.ndarray:
    """Floats less their mean along the first axis, of their type: what is always the same becomes exactly 0."""
    return values - values.mean(0, dtype=np.float64).astype(values.dtype)
