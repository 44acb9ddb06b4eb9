"""A short video of the policy at work."""

from __future__ import annotations

import warnings
from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import torch

from deflow.agents.base import Agent
from deflow.envs.ogbench import make_env, seeded_reset
from deflow.errors import UserError
from deflow.seeding import torch_generator

FRAMES_PER_SECOND = 20
SIZE = 256  # pixels; a multiple of 16, which the encoder would otherwise enforce by resizing


def record_video(task: str, agent: Agent, path: Path, episodes: int, seed: int) -> None:
    """Write an mp4 of `episodes` episodes, one after the other.

    Args:
        task: OGBench's single-task name.
        agent: the policy.
        path: of the mp4 file.
        episodes: to show.
        seed: of resets and policy noise.

    Raises:
        UserError: if this machine cannot render off-screen.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # manipulation environments declare no render modes, but have them
        env = make_env(task, render_mode="rgb_array", width=SIZE, height=SIZE)
    frames: list[np.ndarray] = []
    generator = torch_generator(torch.device("cpu"), seed, "video")
    for episode in range(episodes):
        observation, _ = seeded_reset(env, seed + episode)
        _cheapen_rendering(env)
        done = False
        while not done:
            frames.append(_render(env))
            z = torch.randn(1, agent.candidates, agent.spec.action_dim, generator=generator)
            state = torch.as_tensor(observation, dtype=torch.float32)[None]
            action = agent.act(state.to(agent.device), z.to(agent.device))[0].cpu().numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    env.close()
    part = path.with_name(f".{path.name}")
    imageio.mimwrite(
        part,
        frames,  # type: ignore[arg-type]
        fps=FRAMES_PER_SECOND,
        macro_block_size=16,
    )
    part.replace(path)


def _cheapen_rendering(env: gymnasium.Env) -> None:
    """Turn off shadows and anti-aliasing, which cost most of a frame without a GPU."""
    maze, manipulation = (getattr(env.unwrapped, name, None) for name in ("model", "_model"))
    for model in (maze, manipulation):
        if model is not None:
            model.vis.quality.shadowsize = 0
            model.vis.quality.offsamples = 0


def _render(env: gymnasium.Env) -> np.ndarray:
    try:
        return np.asarray(env.render())
    except Exception as error:  # whatever the graphics library raises
        raise UserError(f"no video: this machine cannot render off-screen (install EGL): {error}") from error
