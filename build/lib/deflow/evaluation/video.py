"""A short video of the policy at work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v2 as imageio
import numpy as np

from deflow.errors import UserError
from deflow.evaluation.rollout import Evaluator
from deflow.files import replacing
from deflow.policy import Policy

FRAMES_PER_SECOND = 20
SIZE = 256  # pixels; a multiple of 16, which the encoder would otherwise enforce by resizing


def record_video(make_env: Callable[..., gymnasium.Env], policy: Policy, path: Path, episodes: int, seed: int) -> None:
    """Write an mp4 of the first `episodes` episodes of the evaluation with the same seed, one after the other.

    Args:
        make_env: makes the environment, given Gymnasium's rendering arguments.
        policy: to show.
        path: of the mp4 file.
        episodes: to show.
        seed: of the evaluation.

    Raises:
        UserError: if this machine cannot render off-screen.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # manipulation environments declare no render modes, but have them
        if policy.spec.image is None:
            camera = _Camera(make_env(render_mode="rgb_array", width=SIZE, height=SIZE), cheap=True)
        else:  # what the policy sees is what is rendered, and must stay as it is
            camera = _Camera(make_env(render_mode="rgb_array"), cheap=False)
    evaluator = Evaluator(lambda: camera, episodes, num_envs=1, seed=seed)
    evaluator.run(policy)
    evaluator.close()
    with replacing(path) as part:
        imageio.mimwrite(part, camera.frames, fps=FRAMES_PER_SECOND, macro_block_size=16)  # type: ignore[arg-type]


class _Camera(gymnasium.Wrapper):
    """Takes a picture of every state."""

    def __init__(self, env: gymnasium.Env, cheap: bool) -> None:
        super().__init__(env)
        self.cheap = cheap
        self.frames: list[np.ndarray] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(**kwargs)
        if self.cheap:
            _cheapen_rendering(self.env)  # a reset may build the model anew
        self._take()
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        self._take()
        return result

    def _take(self) -> None:
        try:
            self.frames.append(np.asarray(self.env.render()))
        except Exception as error:  # whatever the graphics library raises
            raise UserError(f"no video: this machine cannot render off-screen (install EGL): {error}") from error


def _cheapen_rendering(env: gymnasium.Env) -> None:
    """Turn off shadows and anti-aliasing, which cost most of a frame without a GPU."""
    maze, manipulation = (getattr(env.unwrapped, name, None) for name in ("model", "_model"))
    for model in (maze, manipulation):
        if model is not None:
            model.vis.quality.shadowsize = 0
            model.vis.quality.offsamples = 0
