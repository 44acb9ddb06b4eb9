"""Two ways to act, equally good in one half of the states and not in the other: which policies keep both?

python studies/bimodal.py [PICTURE.png]    trains every flow agent for some minutes; prints the table of
                                           docs/results/modes.md

One-step episodes. The state s is uniform in [-1, 1]; the data's action (2-d) lies around (-0.6, 0) or (0.6, 0), a coin
decides. The reward of either mode is a bump whose top is 0.1 above the data's centre. Left of s = 0 both tops are worth
1, right of it the left one is worth half.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.config import CONFIG_DIR
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import compact
from deflow.data.streams import BatchStream
from deflow.evaluation.diversity import policy_samples
from deflow.policy import Policy
from deflow.timing import seconds_of_updates
from deflow.types import Lookahead, Spec

EPISODES, SAMPLES = 20_000, 1000
CENTRES = np.array([[-0.6, 0.0], [0.6, 0.0]])
SPREAD, LIFT, WIDTH = 0.05, 0.1, 0.2
EQUAL, UNEQUAL = -0.5, 0.5  # the states that are looked at

# Name in the table -> overrides. The residual of DeFlow may reach the top: 0.1 in one of two dimensions.
TRUST_REGION = "agent.trust_region=0.005"
AGENTS = {
    "flow BC": ["agent=flow_bc"],
    "DeFlow": ["agent=deflow", TRUST_REGION],
    "DeFlow, best of 8": ["agent=deflow", TRUST_REGION, "agent.best_of_n=8"],
    "FBRAC, alpha 10": ["agent=fbrac"],
    "FBRAC, alpha 1": ["agent=fbrac", "agent.alpha=1"],
    "FQL, alpha 10": ["agent=fql", "agent.actor.alpha=10"],
    "FQL, alpha 1": ["agent=fql", "agent.actor.alpha=1"],
    "FQL, alpha 0.1": ["agent=fql", "agent.actor.alpha=0.1"],
    "FAWAC": ["agent=fawac"],
    "IFQL": ["agent=ifql"],
}


def reward(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Of actions (..., 2) in states (...,)."""
    bumps = [np.exp(-np.square(actions - centre - [0, LIFT]).sum(-1) / (2 * WIDTH**2)) for centre in CENTRES]
    return np.where(states < 0, 1.0, 0.5) * bumps[0] + bumps[1]


def transitions(seed: int = 0) -> Transitions:
    """The data."""
    rng = np.random.default_rng(seed)
    states = rng.uniform(-1, 1, EPISODES)
    actions = CENTRES[rng.integers(2, size=EPISODES)] + SPREAD * rng.standard_normal((EPISODES, 2))
    ends = np.ones(EPISODES, bool)
    arrays = compact(states[:, None], actions, reward(states, actions), np.zeros(EPISODES), ends, states[:, None])
    return Transitions.from_compact(arrays, "bimodal")


def train(overrides: Sequence[str], updates: int, hidden: int = 128, lr: float = 1e-3, seed: int = 0) -> Agent:
    """An agent trained jointly on the data."""
    settings = [f"networks.hidden=[{hidden},{hidden}]", "tau=0.02", f"agent.optimizer.lr={lr}", "task=cube_single"]
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose("benchmark", overrides=[*settings, *overrides])
    torch.manual_seed(seed)
    agent = build_agent(config.agent, Spec(observation_dim=1, action_dim=2))
    agent.begin_stage("joint", "all", first_step=0)
    seconds_of_updates(agent, BatchStream(transitions(), 256, 0, updates, (seed, "bimodal"), Lookahead(discount=0.99)))
    return agent


def actions_at(agent: Agent, state: float) -> np.ndarray:
    """Actions that the policy takes in one state, shape (SAMPLES, 2)."""
    return policy_samples(Policy(agent), torch.tensor([[state]]), SAMPLES, seed=0)["policy"][0]


def shares(actions: np.ndarray) -> tuple[float, float]:
    """Shares of the actions within 0.25 of the left and of the right mode."""
    near = np.linalg.norm(actions[:, None] - CENTRES, axis=-1) < 0.25
    left, right = near.mean(0)
    return float(left), float(right)


def main(picture: Path | None) -> None:
    figure = Figure(figsize=(3 * len(AGENTS), 6), layout="constrained")
    axes = figure.subplots(2, len(AGENTS))
    print("| | left, right where equal | reward | left, right where not | reward |\n|---|---|---|---|---|")
    for column, (name, overrides) in enumerate(AGENTS.items()):
        agent = train(overrides, updates=6000)
        cells = []
        for row, state in enumerate((EQUAL, UNEQUAL)):
            actions = actions_at(agent, state)
            left, right = shares(actions)
            cells += [f"{left:.2f}, {right:.2f}", f"{reward(np.array(state), actions).mean():.2f}"]
            draw(axes[row, column], state, actions, name if row == 0 else "")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if picture is not None:
        figure.savefig(picture, dpi=50)


def draw(axis: Axes, state: float, actions: np.ndarray, title: str) -> None:
    side = np.linspace(-1, 1, 80)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    axis.contourf(side, side, reward(np.array(state), grid), levels=12, cmap="Greys", alpha=0.6)
    axis.scatter(actions[:200, 0], actions[:200, 1], s=6, c="tab:red")
    axis.set(title=title, xlim=(-1, 1), ylim=(-1, 1), xlabel="both equal" if state == EQUAL else "right one better")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
