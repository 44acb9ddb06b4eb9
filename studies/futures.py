"""Where a data set's own policy leads from a state and an action: as occupancy flows draw it, and as it was.

    python studies/futures.py PICTURE.png DATA.npz [updates]      # 20000 for each flow, unless said otherwise

DATA.npz is a pointmaze in OGBench's layout. Above: states ahead that an occupancy flow draws, which learned from single
transitions with the data's next action in the place of a policy's. Below: what followed in the data within `NEAR` of
the same state and action, after numbers of steps that are geometric as the discount says. The star is the state.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deflow.data.memory.transitions import Transitions
from deflow.modules.occupancy_flow import OccupancyFlow
from deflow.types import Lookahead, Spec

DISCOUNTS = (0.95, 0.98, 0.995)
START = (8.0, 8.0)  # in the maze's units; the data's state nearest to it is taken
NEAR = 1.5  # the same units, for positions; actions may differ by a third of their range
FUTURES = 1000
BATCH, RATE, TAU = 256, 1e-3, 0.05


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
    spec = Spec(states.shape[1], data.actions.shape[1])
    flow = OccupancyFlow(spec, statistics, discount, hidden, tau=TAU, samples=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(flow.parameters(), RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        rows = data.starts[torch.randint(len(data), (BATCH,), generator=generator)]
        batch, _ = data.batch(rows, Lookahead(discount, 1, 1))
        assert batch.next_actions is not None
        loss, _ = flow.loss(batch, batch.next_actions, torch.rand(BATCH, flow.levels, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        for online, target, tau in flow.target_pairs():
            target.data.lerp_(online.data, tau)
        optimizer.step()
        decay.step()
    return flow


def followed(data: Transitions, row: int, discount: float) -> torch.Tensor:
    """States that the data reached from near the state and action of `row`, shape (futures, 2)."""
    rng = np.random.default_rng(0)
    near = (data.states[:, :2] - data.states[row, :2]).norm(dim=1) < NEAR
    near &= (data.actions - data.actions[row]).abs().amax(1) < 2 / 3
    rows = np.flatnonzero((near & data.has_successor).numpy())
    ends = np.flatnonzero(~data.has_successor.numpy())  # last states of trajectories, where they stay
    chosen = rng.choice(rows, FUTURES)
    ahead = np.minimum(chosen + rng.geometric(1 - discount, FUTURES), ends[np.searchsorted(ends, chosen)])
    return data.states[torch.from_numpy(ahead), :2]


def draw(axis: Axes, title: str, futures: torch.Tensor, data: Transitions, row: int) -> None:
    axis.scatter(*data.states[:: max(1, len(data.states) // 5000), :2].T, s=1, color="0.85", rasterized=True)
    axis.scatter(*futures.T, s=3, alpha=0.5, color="tab:blue", rasterized=True)
    axis.plot(*data.states[row, :2], marker="*", markersize=12, color="black")
    low, high = data.states[:, :2].amin(0) - 2, data.states[:, :2].amax(0) + 2
    axis.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axis.set_title(title, fontsize="medium")


def main(picture: Path, path: Path, updates: int = 20_000, hidden: tuple[int, ...] = (128, 128, 128)) -> None:
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
        steps = f"{1 / (1 - discount):.0f} steps ahead on average"
        draw(above, f"the flow, {steps}", flow.sample(state, action, z).observations[:, :2], data, row)
        draw(below, f"the data, {steps}", followed(data, row, discount), data, row)
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
