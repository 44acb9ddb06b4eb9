"""What policies of a pointmaze believe of it, and how they go: values of the data's states, and episodes over them.

    python studies/maze_values.py PICTURE.png RUN ...      # folders of runs with a critic, on a maze of two coordinates

One panel a run: the value of the policy's own action in states of the data, and four episodes from the task's start.
RUN is a folder as reproduce.py names it, AGENT/seed_0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deflow.checkpoints import agent_of, load_checkpoint, newest_checkpoint, units_of
from deflow.policy import Policy

EPISODES, STATES = 4, 2500
COLUMNS = 3


def draw(ax: Axes, run: Path) -> None:
    """A run's panel."""
    checkpoint = load_checkpoint(newest_checkpoint(run))
    agent = agent_of(checkpoint)
    agent.freeze()
    policy = Policy(agent, units=units_of(checkpoint))
    source = instantiate(checkpoint["deflow"]["config"]["data"]["source"])
    data, _ = source.load()
    states = data.states[torch.linspace(0, len(data.states) - 1, STATES).long()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        actions = agent.act(states, torch.randn(len(states), *agent.act_noise_shape, generator=generator))
        values = agent.action_values(states, actions)
    dots = ax.scatter(states[:, 0], states[:, 1], c=values, s=4, cmap="viridis")
    ax.figure.colorbar(dots, ax=ax)
    env, reached = source.make_env(), 0
    for number in range(EPISODES):
        way, success = played(env, policy, number)
        ax.plot(way[:, 0], way[:, 1], color="tab:red", linewidth=0.8)
        reached += success
    ax.set_title(f"{run.parent.name} {run.name}: {reached} of {EPISODES} arrive")
    ax.set_aspect("equal")


def played(env: gymnasium.Env, policy: Policy, seed: int) -> tuple[np.ndarray, bool]:
    """The states of an episode, shape (steps + 1, 2), and whether it ended at the goal."""
    policy.reset(seed=seed)
    np.random.seed(seed)  # noqa: NPY002 (of which OGBench draws where an episode begins)
    observation, _ = env.reset(seed=seed)
    way, over, success = [observation], False, False
    while not over:
        observation, _, terminated, truncated, info = env.step(policy.act(observation))
        way.append(observation)
        over, success = terminated or truncated, bool(info["success"])
    return np.stack(way), success


def main(picture: Path, runs: list[Path]) -> None:
    """The picture of all runs."""
    rows = -(-len(runs) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for ax, run in zip(axes, runs, strict=False):
        draw(ax, run)
    for ax in axes[len(runs) :]:
        ax.set_axis_off()
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
