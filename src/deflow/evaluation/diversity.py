"""How diverse a trained policy is beside the data: modes covered, variance, distance to the data, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from deflow.agents.base import Agent
from deflow.data.memory.transitions import Transitions
from deflow.data.scales import standardised
from deflow.files import replacing
from deflow.policy import Policy, evaluation_mode
from deflow.seeding import fold_seed, torch_generator
from deflow.types import Lookahead

# Rows among which neighbours are searched: enough for close ones, few enough for an exact search in a second.
MAX_ROWS = 200_000
# Share of the actions at a state that makes a cluster a mode, and of the policy's actions that covers it.
MODE_SHARE, COVERED_SHARE = 0.1, 0.05
PICTURED, GRID = 6, 60  # states in the picture, points a side of the value's grid


@dataclass(frozen=True)
class Neighbourhoods:
    """Some of the data's states, and the actions taken in the states nearest to each."""

    states: Tensor  # (states, observation_dim)
    actions: np.ndarray  # (states, neighbours, action_dim), the state's own action first

    @classmethod
    def of(cls, transitions: Transitions, states: int, neighbours: int, horizon: int, seed: int) -> Neighbourhoods:
        """Around `states` random states; distances are between standardised observations.

        Args:
            transitions: the data.
            states: to choose; all of them if there are not so many.
            neighbours: of each, itself included; all states if there are not so many.
            horizon: actions of a chunk.
            seed: of the choice.
        """
        rng = np.random.default_rng(fold_seed(seed, "neighbourhoods"))
        starts = transitions.chunk_starts(horizon)
        rows = starts[torch.from_numpy(rng.permutation(len(starts))[:MAX_ROWS])]
        batch, _ = transitions.batch(rows, Lookahead(discount=1.0, steps=horizon, horizon=horizon))
        points = standardised(batch.observations.numpy())
        chosen = slice(min(states, len(rows)))
        from sklearn.neighbors import NearestNeighbors  # a second to import, needed once a run

        search = NearestNeighbors(n_neighbors=min(neighbours, len(rows)), algorithm="brute").fit(points)
        found = search.kneighbors(points[chosen], return_distance=False)
        return cls(batch.observations[chosen], batch.actions.numpy()[found])


@torch.no_grad()
def policy_samples(policy: Policy, states: Tensor, samples: int, seed: int) -> dict[str, np.ndarray]:
    """Actions drawn at each state, shape (states, samples, action_dim).

    Args:
        policy: whose they are.
        states: shape (states, observation_dim).
        samples: actions at each state.
        seed: of the noise.

    Returns:
        `policy` (the actions taken) and, if the agent improves on a proposal, `proposal`, from the same noise.
    """
    agent, drawn = policy.agent, []
    generator = torch_generator(agent.device, seed, "diversity")
    with evaluation_mode(agent):
        for some in states.to(agent.device).split(256):
            z = agent.draw_act_noise(len(some) * samples, generator)
            observations = some.repeat_interleave(samples, dim=0)
            drawn.append((agent.propose(observations, z), policy.actions(observations, z)))
    named = zip(("proposal", "policy"), zip(*drawn, strict=True), strict=True)
    return {name: _by_state(actions, samples) for name, actions in named if actions[0] is not None}


def _by_state(actions: Sequence[Tensor], samples: int) -> np.ndarray:
    """Shape (states, samples, action_dim)."""
    return torch.cat(list(actions)).unflatten(0, (-1, samples)).float().cpu().numpy()


def diversity(policy: Policy, around: Neighbourhoods, samples: int, radius: float, seed: int) -> dict[str, Any]:
    """The policy's actions beside the data's at the same states, averaged over states.

    Distances between actions are root mean squares over the dimensions, in action units.

    Args:
        policy: to measure.
        around: states and the data's actions there.
        samples: actions drawn at each state, at least 2.
        radius: actions of the data that are further apart than this are of different modes, see `modes`.
        seed: of the noise.

    Returns:
        For the data, the policy and, if there is one, its proposal: `modes` covered, `variance` at a state, and
        `distance_to_data`, to the nearest of the data's actions (for the data's own: the nearest other one).
    """
    drawn = {"data": around.actions} | policy_samples(policy, around.states, samples, seed)
    centres = [modes(actions, radius) for actions in around.actions]
    covered = {
        name: [_covered(points, of_state, radius) for points, of_state in zip(actions, centres, strict=True)]
        for name, actions in drawn.items()
    }
    distances = {name: _distances(actions, around.actions) for name, actions in drawn.items()}
    np.einsum("sii->si", distances["data"])[:] = np.inf  # an action of the data is not its own nearest
    return {
        "states": len(around.states),
        "modes": {name: float(np.mean(counts)) for name, counts in covered.items()},
        "variance": {name: float(actions.var(axis=1, ddof=1).mean()) for name, actions in drawn.items()},
        "distance_to_data": {name: float(matrix.min(axis=2).mean()) for name, matrix in distances.items()},
    }


def modes(actions: np.ndarray, radius: float) -> np.ndarray:
    """Centres of the clusters that hold at least a tenth of `actions`, shape (modes, action_dim); there may be none.

    Clusters are joined while their members are on average nearer than `radius`.

    Args:
        actions: shape (actions, action_dim), at least 2.
        radius: as a root mean square over the dimensions.
    """
    from scipy.cluster.hierarchy import fclusterdata  # half a second to import, needed once a run

    labels = fclusterdata(actions, radius * np.sqrt(actions.shape[1]), criterion="distance", method="average")
    counts = np.bincount(labels)
    found = [actions[labels == label].mean(0) for label in np.flatnonzero(counts >= MODE_SHARE * len(actions))]
    return np.reshape(found, (-1, actions.shape[1]))


def _covered(actions: np.ndarray, centres: np.ndarray, radius: float) -> int:
    """Centres that a twentieth of `actions` are nearest to and within `radius` of."""
    if len(centres) == 0:
        return 0
    distances = _distances(actions, centres)
    nearest = np.where(distances.min(axis=1) <= radius, distances.argmin(axis=1), len(centres))
    counts = np.bincount(nearest, minlength=len(centres) + 1)[: len(centres)]
    return int((counts >= COVERED_SHARE * len(actions)).sum())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean squares over the dimensions between all of (..., m, dim) and (..., n, dim): (..., m, n)."""
    return np.sqrt(np.square(a[..., :, None, :] - b[..., None, :, :]).mean(axis=-1))


def draw_actions(policy: Policy, around: Neighbourhoods, samples: int, path: Path, seed: int) -> None:
    """A picture for some states: the data's actions, the proposals and the actions taken, over the value.

    Each panel is the slice through the mean action along the two dimensions in which the data vary most there.

    Args:
        policy: to show; without values the background stays empty, with one action dimension there is no picture.
        around: states and the data's actions there.
        samples: actions drawn at each state.
        path: of the PNG.
        seed: of the noise.
    """
    if policy.spec.action_dim < 2:
        return
    count = min(PICTURED, len(around.states))
    drawn = policy_samples(policy, around.states[:count], samples, seed)
    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle("actions at single states, over Q (darker is higher)")
    axes = figure.subplots(2, PICTURED // 2).flat
    for state in range(count):
        here = {name: actions[state] for name, actions in drawn.items()}
        _draw_state(axes[state], policy.agent, around.states[state], around.actions[state], here)
    axes[0].legend(loc="upper left", fontsize="small")
    for axis in axes[count:]:
        axis.set_axis_off()
    with replacing(path) as part:
        figure.savefig(part, dpi=80)


def _draw_state(
    axis: Axes, agent: Agent, state: Tensor, data_actions: np.ndarray, drawn: dict[str, np.ndarray]
) -> None:
    x, y = np.argsort(data_actions.var(axis=0))[-2:][::-1]
    side = np.linspace(-1, 1, GRID, dtype=np.float32)
    values = _values_on_grid(agent, state, drawn["policy"].mean(axis=0), (int(x), int(y)), side)
    if values is not None:
        axis.contourf(side, side, values, levels=20, cmap="Greys", alpha=0.6)
    axis.scatter(data_actions[:, x], data_actions[:, y], s=40, c="tab:green", marker="x", label="data nearby")
    policy = drawn["policy"]
    if "proposal" in drawn:
        proposal = drawn["proposal"]
        axis.scatter(proposal[:, x], proposal[:, y], s=20, facecolors="none", edgecolors="tab:blue", label="proposal")
        moves = policy - proposal
        style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.002, "color": "tab:red"}
        axis.quiver(proposal[:, x], proposal[:, y], moves[:, x], moves[:, y], **style)
    axis.scatter(policy[:, x], policy[:, y], s=12, c="tab:red", label="action taken")
    axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xlabel=f"action {x}", ylabel=f"action {y}")


@torch.no_grad()
def _values_on_grid(
    agent: Agent, state: Tensor, centre: np.ndarray, dimensions: tuple[int, int], side: np.ndarray
) -> np.ndarray | None:
    """The agent's values, if it has any, on the grid `side` x `side` (rows: the second dimension) through `centre`."""
    actions = np.tile(centre, (len(side) ** 2, 1)).astype(np.float32)
    actions[:, dimensions] = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    states = state.expand(len(actions), -1).to(agent.device)
    with evaluation_mode(agent):
        values = agent.action_values(states, torch.from_numpy(actions).to(agent.device))
    return None if values is None else values.float().cpu().numpy().reshape(len(side), len(side))
