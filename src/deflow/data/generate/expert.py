"""Train a walking ant such as the one that ships with the package, and measure how fast it walks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import save_file

from deflow.data.generate.ant import AntExpert
from deflow.envs.ogbench import load_mujoco, seeded_reset
from deflow.extras import require
from deflow.files import refuse_to_replace, replacing

HIDDEN = (256, 256)


def train_expert(
    steps: int, out: Path, seed: int, episodes: int, overwrite: bool = False
) -> dict[str, tuple[float, float]]:
    """Train with soft actor-critic, write the policy to `out`, print its speed beside the shipped policy's.

    Args:
        steps: of the environment; the shipped policy took 400,000.
        out: `.safetensors` file.
        seed: of the training.
        episodes: on which each policy's speed is measured.
        overwrite: whether a file `out` may be replaced.

    Returns:
        Speed and its standard error, metres a step along the commanded direction, of `trained` and `shipped`.

    Raises:
        UserError: if stable-baselines3 is missing, or a file would be lost.
    """
    out = out.expanduser()
    if not overwrite:
        refuse_to_replace([out])
    require("train_expert.py", "stable_baselines3", "tqdm")
    from stable_baselines3 import SAC

    env = make_walking_env()
    np.random.seed(seed)  # noqa: NPY002 (the wrapper draws its directions from there)
    policy = {"net_arch": list(HIDDEN), "activation_fn": _GELUTanh}
    model = SAC("MlpPolicy", env, seed=seed, policy_kwargs=policy, device="cpu")
    model.learn(steps, progress_bar=True)
    weights = _actor_weights(model.actor)
    with replacing(out) as part:
        save_file(weights, part, metadata={"algorithm": f"soft actor-critic, {steps} steps, seed {seed}"})
    policies = {"trained": AntExpert(weights), "shipped": AntExpert()}
    speeds = {name: walking_speed(expert, env, episodes) for name, expert in policies.items()}
    env.close()
    for name, (mean, error) in speeds.items():
        Console().print(f"{name}: {mean:.3f} +- {error:.3f} m a step along the commanded direction")
    return speeds


def make_walking_env() -> gymnasium.Env:
    """OGBench's ant on a plane, commanded to walk in a direction that changes every 100 steps."""
    load_mujoco()
    import ogbench.online_locomotion  # noqa: F401 (registers the environment)
    from ogbench.online_locomotion.wrappers import GymXYWrapper

    return GymXYWrapper(gymnasium.make("online-ant-v0"), resample_interval=100)


def walking_speed(
    policy: Callable[[np.ndarray, np.ndarray], np.ndarray], env: gymnasium.Env, episodes: int
) -> tuple[float, float]:
    """Mean progress along the commanded direction in metres a step, and its standard error over episodes."""
    speeds = []
    for episode in range(episodes):
        np.random.seed(episode)  # noqa: NPY002 (the wrapper draws its directions from there)
        observation, _ = seeded_reset(env, episode)
        progress, done = [], False
        while not done:
            state, direction = np.concatenate([np.zeros(2), observation[:-2]]), observation[-2:]
            observation, reward, terminated, truncated, _ = env.step(policy(state, direction))
            progress.append(float(reward))
            done = terminated or truncated
        speeds.append(np.mean(progress))
    return float(np.mean(speeds)), float(np.std(speeds, ddof=1) / np.sqrt(episodes))


class _GELUTanh(torch.nn.GELU):
    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def _actor_weights(actor: Any) -> dict[str, np.ndarray]:
    """The names and layouts of `AntExpert` from stable-baselines3's actor."""
    layers = {"hidden_0": actor.latent_pi[0], "hidden_1": actor.latent_pi[2], "mean": actor.mu}
    weights = {}
    for name, layer in layers.items():
        weights[f"{name}.kernel"] = np.ascontiguousarray(layer.weight.detach().numpy().T)
        weights[f"{name}.bias"] = layer.bias.detach().numpy()
    return weights
