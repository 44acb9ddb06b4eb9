"""States that lie ahead of one state and action, as the occupancy flows of several runs see them, over the maze.

    python studies/futures.py PICTURE.png DATA.npz RUN ...     finished pointmaze runs with agent/critic=occupancy

The state and the action are those of the training data that are nearest to `START`; the walls are where no state of the
data is. One panel a run, in the order given, under its discount and horizon.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from deflow.checkpoints import agent_of, load_checkpoint
from deflow.modules.occupancy_flow import OccupancyFlow
from deflow.seeding import torch_generator

START = (8.0, 8.0)  # in the maze's units
FUTURES = 2000


def of_run(run: Path) -> OccupancyFlow:
    (checkpoint,) = run.glob("checkpoints/*/final.ckpt")
    critic = getattr(agent_of(load_checkpoint(checkpoint)), "critic", None)
    if not isinstance(critic, OccupancyFlow):
        raise SystemExit(f"{run} has no occupancy flow: train with agent/critic=occupancy")
    return critic


def draw(axis: Axes, critic: OccupancyFlow, state: Tensor, action: Tensor, everywhere: Tensor) -> None:
    generator = torch_generator(critic.device, 0, "futures")
    z = torch.randn(FUTURES, critic.point_dim, generator=generator)
    future = critic.sample(state.expand(FUTURES, -1), action.expand(FUTURES, -1), z)
    axis.scatter(*everywhere.T, s=1, color="0.9", rasterized=True)
    for goes_on, name, color in ((1, "the task goes on", "tab:blue"), (0, "it has ended", "tab:orange")):
        at = future.observations[future.continues == goes_on]
        axis.scatter(*at[:, :2].T, s=3, alpha=0.4, color=color, label=f"{name} ({len(at) / FUTURES:.0%})")
    axis.plot(*state[:2], marker="*", markersize=14, color="black", linestyle="", label="the state")
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.set_title(f"discount {critic.discount:g}, horizon {1 / (1 - critic.discount):.0f} steps")
    axis.legend(fontsize="x-small", loc="upper left")


if __name__ == "__main__":
    picture, data, *runs = (Path(argument) for argument in sys.argv[1:])
    arrays = dict(np.load(data))
    observations, actions = (torch.from_numpy(arrays[name]).float() for name in ("observations", "actions"))
    nearest = int((observations[:, :2] - torch.tensor(START)).norm(dim=1).argmin())
    figure = Figure(figsize=(4.5 * len(runs), 4.5), layout="constrained")
    for axis, run in zip(np.ravel(figure.subplots(1, len(runs), squeeze=False)), runs, strict=True):
        draw(axis, of_run(run), observations[nearest], actions[nearest], observations[:: len(observations) // 5000, :2])
    figure.savefig(picture, dpi=80)
