"""A short video of the policy at work."""

from __future__ import annotations

import logging
from pathlib import Path

import gymnasium
import numpy as np
import torch

from deflow.agents.base import Agent
from deflow.envs.ogbench import seeded_reset
from deflow.errors import UserError
from deflow.seeding import torch_generator

log = logging.getLogger(__name__)

FRAMES_PER_SECOND = 20
SIZE = 256  # pixels; a multiple of 16, which the encoder would otherwise enforce by resizing


def record_video(env: gymnasium.Env, agent: Agent, path: Path, episodes: int, seed: int) -> None:
    """Write an mp4 of `episodes` episodes, one after the other.

    Args:
        env: made with `render_mode="rgb_array"`, 256 pixels wide and high.
        agent: the policy.
        path: of the mp4 file.
        episodes: to show.
        seed: of resets and policy noise.

    Raises:
        UserError: if this machine cannot render off-screen.
    """
    import imageio.v2 as imageio

    frames: list[np.ndarray] = []
    generator = torch_generator(torch.device("cpu"), seed, "video")
    for episode in range(episodes):
        observation, _ = seeded_reset(env, seed + episode)
        done = False
        while not done:
            frames.append(_render(env))
            z = torch.randn(1, agent.candidates, agent.spec.action_dim, generator=generator)
            state = torch.as_tensor(observation, dtype=torch.float32)[None]
            action = agent.act(state.to(agent.device), z.to(agent.device))[0].cpu().numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    part = path.with_name(f".{path.name}")
    imageio.mimwrite(part, frames, fps=FRAMES_PER_SECOND, macro_block_size=16)
    part.replace(path)


def cheapen_rendering(env: gymnasium.Env) -> None:
    """Turn off shadows and anti-aliasing, which cost most of a frame without a GPU."""
    model = getattr(env.unwrapped, "model", None) or getattr(env.unwrapped, "_model", None)
    if model is not None:
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0


def _render(env: gymnasium.Env) -> np.ndarray:
    try:
        return np.asarray(env.render())
    except Exception as error:  # whatever the graphics library raises
        raise UserError(f"no video: this machine cannot render off-screen (install EGL): {error}") from error
