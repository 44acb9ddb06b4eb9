"""How much numbers vary, in whatever units they are."""

from __future__ import annotations

import numpy as np

ROUNDING = 2.0**-23  # what single precision leaves of a number that is always the same, as a share of it
ARITHMETIC = 1e-6  # what a simulator leaves of one that is 0, as a share of the largest deviation, or of 1


def deviations(values: np.ndarray) -> np.ndarray:
    """Standard deviations along the first axis, shape (dimensions,); 0 for what is constant but for arithmetic."""
    found = centred(values).std(0)
    return np.where(found > negligible(np.abs(values).max(0), found), found, 0.0)


def negligible(size: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """How much may be arithmetic of a deviation of numbers up to such a size, or of their differences.

    Args:
        size: the largest absolute numbers, shape (dimensions,).
        deviation: standard deviations, shape (dimensions,).
    """
    return np.maximum(ROUNDING * size, ARITHMETIC * min(1.0, deviation.max()))


def standardised(points: np.ndarray) -> np.ndarray:
    """Points as distances between them are taken: in standard deviations from their mean, float32.

    What does not vary is 0 in all of them: its size would take the distances' precision.

    Args:
        points: shape (rows, dimensions).
    """
    points = np.asarray(points, np.float32)
    scale = deviations(points)
    return centred(points) / np.where(scale > 0, scale, np.inf).astype(np.float32)


def centred(values: np.ndarray) -> np.ndarray:
    """Floats less their mean along the first axis, of their type: what is always the same becomes exactly 0."""
    return values - values.mean(0, dtype=np.float64).astype(values.dtype)
