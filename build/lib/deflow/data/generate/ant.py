"""The walking policy that makes the antmaze data: it goes where it is told to."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from safetensors.numpy import load_file

ASSET = files("deflow.data.generate") / "assets" / "ant_expert.safetensors"


class AntExpert:
    """OGBench's ant walking along a direction, by a small network trained with soft actor-critic.

    It was trained for 400,000 steps of `online-ant-v0` under OGBench's `GymXYWrapper` (a unit direction drawn anew
    every 100 steps; the reward is the progress along it) and walks 0.15 m a step. `train_expert.py` trains such a one.

    Args:
        weights: `hidden_0`, `hidden_1` and `mean`, each with a `.kernel` (in, out) and a `.bias`; the shipped ones
            unless given.
    """

    def __init__(self, weights: dict[str, np.ndarray] | None = None) -> None:
        self._weights = load_file(str(ASSET)) if weights is None else weights

    def __call__(self, observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Torques in [-1, 1], shape (8,).

        Args:
            observation: the ant's state in a maze: x, y, the other 13 positions, 14 velocities; shape (29,).
            direction: unit vector in the plane, shape (2,).
        """
        # One state at a time: in a batch an episode's bits would depend on its neighbours. A tenth of a step's time.
        x = np.concatenate([observation[2:], direction]).astype(np.float32)
        for layer in ("hidden_0", "hidden_1"):
            x = _gelu_tanh(self._linear(x, layer))
        return np.tanh(self._linear(x, "mean"))

    def _linear(self, x: np.ndarray, layer: str) -> np.ndarray:
        return x @ self._weights[f"{layer}.kernel"] + self._weights[f"{layer}.bias"]


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in the tanh form, with which the policy was trained."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)  # numpy's power is ten times slower
    return 0.5 * x * (1 + np.tanh(inner))
