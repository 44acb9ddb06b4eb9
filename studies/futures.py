"""Where a data set's own policy leads from a state and an action: as occupancy flows draw it, and as it is.

    python studies/futures.py PICTURE.png DATA.npz [updates]      # 10000 for each flow, unless said otherwise

DATA.npz is a pointmaze in OGBench's layout. Above: states ahead that an occupancy flow draws, which learned from single
transitions with the data's next action in the place of a policy's. Below: what those transitions know of the future,
by chains of them (which is not what followed in the data, whose trajectories have goals that no state shows). The star
is the state.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from occupancy import BATCH, fitted
from scipy.spatial import KDTree

from deflow.data.memory.transitions import Transitions
from deflow.modules.occupancy_flow import OccupancyFlow
from deflow.types import Batch, Lookahead, Spec

DISCOUNTS = (0.95, 0.98, 0.995)
START = (8.0, 8.0)  # in the maze's units; the data's state nearest to it is taken
FUTURES, NEIGHBOURS = 1000, 10
STATES_COUNT = 20  # times as much as actions, among neighbours
RATE, TAU = 1e-3, 0.02


def trained(data: Transitions, discount: float, updates: int, hidden: tuple[int, ...]) -> OccupancyFlow:
    """An occupancy flow of the data's own policy."""
    torch.manual_seed(0)
    states = data.states[data.starts].double()
    statistics: dict[str, object] = {
        "observation_mean": states.mean(0).tolist(),
        "observation_std": states.std(0).tolist(),
        "reward_centre": 0.0,
        "reward_scale": 1.0,
    }
    spec, span = Spec(states.shape[1], data.actions.shape[1]), Lookahead(discount, 1, 1)
    flow = OccupancyFlow(spec, statistics, discount, hidden, tau=TAU, samples=1)  # type: ignore[arg-type]

    def draw(generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
        batch, _ = data.batch(data.starts[torch.randint(len(data), (BATCH,), generator=generator)], span)
        assert batch.next_actions is not None
        return batch, batch.next_actions

    return fitted(flow, draw, updates, RATE)


def chained(data: Transitions, row: int, discount: float) -> torch.Tensor:
    """States ahead of the state and action of `row`, shape (futures, 2), by chains of the data's own transitions.

    A chain goes on with one of the `NEIGHBOURS` transitions that begin nearest to the state and the action with which
    the one before ends, and is as long as the discount says: what single transitions know of the future.
    """
    rng = np.random.default_rng(0)
    states = data.states[:, :2] * (STATES_COUNT / data.states[:, :2].std(0))
    pairs = torch.cat([states, data.decisions(torch.arange(len(data.states)))], dim=1).numpy()
    starts = data.starts.numpy()
    tree = KDTree(pairs[starts])
    at, left = np.full(FUTURES, row), rng.geometric(1 - discount, FUTURES)
    while (under_way := np.flatnonzero(left)).size:
        _, near = tree.query(pairs[at[under_way]], k=NEIGHBOURS)
        chosen = np.take_along_axis(near, rng.integers(NEIGHBOURS, size=(len(near), 1)), 1)[:, 0]
        at[under_way] = starts[chosen] + 1
        left[under_way] -= 1
    return data.states[torch.from_numpy(at), :2]


def draw(axis: Axes, title: str, futures: torch.Tensor, data: Transitions, row: int) -> None:
    x, y = data.states[:: max(1, len(data.states) // 5000), :2].T
    axis.scatter(x, y, s=1, color="0.85", rasterized=True)
    x, y = futures.T
    axis.scatter(x, y, s=3, alpha=0.5, color="tab:blue", rasterized=True)
    axis.plot(*data.states[row, :2], marker="*", markersize=12, color="black")
    low, high = data.states[:, :2].amin(0) - 2, data.states[:, :2].amax(0) + 2
    axis.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axis.set_title(title, fontsize="medium")


def main(picture: Path, path: Path, updates: int = 10_000, *, hidden: tuple[int, ...] = (128, 128, 128)) -> None:
    with np.load(path) as file:
        columns = {name: file[name] for name in ("observations", "actions")}
        goes_on = 1 - file["terminals"].astype(np.float32)
    still = {"rewards": np.zeros_like(goes_on), "masks": np.ones_like(goes_on), "valids": goes_on}  # no task, no end
    data = Transitions.from_compact(columns | still, str(path))
    starts = data.starts
    row = int(starts[(data.states[starts, :2] - torch.tensor(START)).norm(dim=1).argmin()])
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    panels = figure.subplots(2, len(DISCOUNTS))
    for (above, below), discount in zip(panels.T, DISCOUNTS, strict=True):
        flow = trained(data, discount, updates, hidden)
        z = torch.randn(FUTURES, flow.point_dim, generator=torch.Generator().manual_seed(2))
        state, action = data.states[row].expand(FUTURES, -1), data.decisions(torch.tensor([row])).expand(FUTURES, -1)
        steps = f"{1 / (1 - discount):.0f} steps ahead"
        draw(above, f"the flow, {steps}", flow.sample(state, action, z).observations[:, :2], data, row)
        draw(below, f"chains, {steps}", chained(data, row, discount), data, row)
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
