"""How near an occupancy flow comes to occupancies and values that are known in closed form, by objective and horizon.

    python studies/occupancy.py [updates]      # 4000, unless said otherwise: an hour on one core

Systems with walls: a line, along which an action moves one state left or right with a chance of 0.8, under a policy
that goes right in 0.6 of all steps; and a square grid on which the four neighbours are equally likely, whatever the
action. In the last state the task ends, and elsewhere a step costs 1; or it ends with the step into the last state,
which alone earns 1 (`goal`). Of every pair of a state and an action so many futures are drawn and counted at the
nearest state, apart by whether the task has ended. What is printed for each horizon `1 / (1 - gamma)`: their total
variation from the truth, averaged over the pairs, beside that of as many draws from the truth itself; the correlation
of the distilled values with the true ones, and their root mean square error as a share of the largest true value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from deflow.flow.ode import Solver
from deflow.modules.occupancy_flow import Future, Objective, OccupancyFlow
from deflow.types import Batch, Spec

HORIZONS = (5, 20, 100)
FUTURES = 500  # drawn of each pair
BATCH = 256
RIGHT = 0.6  # the policy's share of steps with an action above 0

Draw = Callable[[torch.Generator], tuple[Batch, Tensor]]  # of a batch, and the policy's actions in its next states


class System(NamedTuple):
    """States and what follows from them."""

    positions: Tensor  # (states, dim), in [-1, 1]
    steps: Tensor  # (actions, states, states), chances of the next state, for an action below 0 and one above
    rewards: Tensor  # (states, states), of a step from one to the other
    goes_on: Tensor  # (states, states), 0 where that step ends the task, else 1

    @classmethod
    def line(cls, states: int = 9, goal: bool = False) -> System:
        number = torch.arange(states)
        steps = torch.zeros(2, states, states)
        for action, move in enumerate((-1, 1)):
            steps[action, number, (number + move).clamp(0, states - 1)] += 0.8
            steps[action, number, number] += 0.2
        return cls(torch.linspace(-1, 1, states)[:, None], steps, *cls._ends(states, goal))

    @classmethod
    def grid(cls, side: int = 5) -> System:
        along = torch.arange(side)
        x, y = (axis.flatten() for axis in torch.meshgrid(along, along, indexing="ij"))
        step = torch.zeros(side**2, side**2)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            after = (x + dx).clamp(0, side - 1) * side + (y + dy).clamp(0, side - 1)
            step[torch.arange(side**2), after] += 0.25
        positions = torch.stack([x, y], 1) * 2 / (side - 1) - 1
        return cls(positions, step.expand(2, -1, -1), *cls._ends(side**2, goal=False))

    @staticmethod
    def _ends(states: int, goal: bool) -> tuple[Tensor, Tensor]:
        """Rewards, and whether the task goes on, of steps into the last state, or of those from it."""
        last = (torch.arange(states) == states - 1).float()
        of_steps = last.expand(states, -1) if goal else last[:, None].expand(-1, states)
        return (of_steps if goal else of_steps - 1), 1 - of_steps

    @property
    def pays(self) -> float:
        """The one reward that is not 0."""
        return float(self.rewards[self.rewards != 0][0])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Steps from states that are equally likely, and the policy's actions after them."""
        states = torch.randint(len(self.positions), (size,), generator=generator)
        actions, next_actions = torch.rand(2, size, generator=generator) * 2 - 1
        actions = torch.where(actions > 0, 1.0, -1.0)
        after = torch.multinomial(self.steps[(actions > 0).long(), states], 1, generator=generator).squeeze(1)
        going_right = torch.where(next_actions < 2 * RIGHT - 1, 1.0, -1.0)[:, None]
        earned, goes_on = self.rewards[states, after], self.goes_on[states, after]
        here, there = self.positions[states], self.positions[after]
        return Batch(here, actions[:, None], earned, goes_on, there, going_right), going_right

    def occupancy(self, discount: float) -> Tensor:
        """Chances of a state ahead, shape (actions, states, 2 * states): where the task has ended, then where not."""
        ended, reached = (1 - self.goes_on) * self.steps, (1 - discount) * self.goes_on * self.steps
        return self._with_what_follows(torch.cat([ended, reached], dim=-1), discount)

    def values(self, discount: float) -> Tensor:
        """Of the policy, shape (actions, states)."""
        return self._with_what_follows((self.rewards * self.steps).sum(-1, keepdim=True), discount).squeeze(-1)

    def _with_what_follows(self, at_once: Tensor, discount: float) -> Tensor:
        """Solve Bellman's equation of the policy for what a pair has at once, shape (actions, states, ...)."""
        onward = discount * self.goes_on * self.steps
        of_policy = torch.linalg.solve(torch.eye(len(self.positions)) - _under_policy(onward), _under_policy(at_once))
        return at_once + onward @ of_policy

    def counted(self, future: Future) -> Tensor:
        """Shares of futures, (pairs * FUTURES, ...), as `occupancy` has them, shape (pairs, 2 * states)."""
        nearest = torch.cdist(future.observations, self.positions).argmin(-1)
        nearest = nearest + len(self.positions) * future.continues.long()
        return torch.nn.functional.one_hot(nearest, 2 * len(self.positions)).float().unflatten(0, (-1, FUTURES)).mean(1)


def _under_policy(of_actions: Tensor) -> Tensor:
    return (1 - RIGHT) * of_actions[0] + RIGHT * of_actions[1]


SYSTEMS: dict[str, Callable[[], System]] = {
    "line": System.line,
    "line, goal": partial(System.line, goal=True),
    "grid": System.grid,
}


def total_variation(one: Tensor, other: Tensor) -> Tensor:
    """Of distributions along the last axis."""
    return (one - other).abs().sum(-1) / 2


def trained(system: System, discount: float, updates: int, lr: float = 1e-3, **settings: Any) -> OccupancyFlow:
    """An occupancy flow that learned from so many batches of 256 steps."""
    torch.manual_seed(0)
    dim = system.positions.shape[1]
    spread = system.positions.std(0, correction=0).tolist()
    statistics: Any = {
        "observation_mean": [0.0] * dim,
        "observation_std": spread,
        "reward_centre": system.pays / 2,
        "reward_scale": 0.5,
    }
    usual: dict[str, Any] = {
        "hidden": (64, 64, 64),
        "activation": "silu",
        "tau": 0.02,
        "samples": 1,
        "solver": Solver(steps=10),
    }
    critic = OccupancyFlow(Spec(dim, 1), statistics, discount, **(usual | settings))
    return fitted(critic, partial(system.batch, BATCH), updates, lr)


def fitted(critic: OccupancyFlow, draw: Draw, updates: int, lr: float) -> OccupancyFlow:
    """The same flow after so many updates on batches of `BATCH` steps; `draw` gives one and the next actions."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        batch, next_actions = draw(generator)
        loss, _ = critic.loss(batch, next_actions, torch.rand(BATCH, critic.levels, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        for online, target, tau in critic.target_pairs():
            target.data.lerp_(online.data, tau)
        optimizer.step()
        decay.step()
    return critic


def measured(system: System, critic: OccupancyFlow) -> dict[str, float]:
    """Distances from the truth, see above."""
    generator = torch.Generator().manual_seed(2)
    truth, values = system.occupancy(critic.discount), system.values(critic.discount)
    states = system.positions.repeat(2, 1)
    actions = torch.tensor([-1.0, 1.0]).repeat_interleave(len(system.positions))[:, None]
    z = torch.randn(len(states) * FUTURES, critic.point_dim, generator=generator)
    drawn = critic.sample(states.repeat_interleave(FUTURES, 0), actions.repeat_interleave(FUTURES, 0), z)
    shares = system.counted(drawn)
    flat = truth.flatten(0, 1)
    by_chance = torch.multinomial(flat, FUTURES, replacement=True, generator=generator)
    of_truth = torch.nn.functional.one_hot(by_chance, flat.shape[1]).float().mean(1)
    found = critic.values(states, actions).detach().mean(0)
    return {
        "total variation": total_variation(shares, flat).mean().item(),
        "of the truth": total_variation(of_truth, flat).mean().item(),
        "correlation": torch.corrcoef(torch.stack([found, values.flatten()]))[0, 1].item(),
        "error": ((found - values.flatten()).square().mean().sqrt() / values.abs().max()).item(),
    }


if __name__ == "__main__":
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    torch.set_num_threads(1)
    heads = ["system", "objective", "horizon", "total variation", "of the truth", "correlation", "error"]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    for name, make in SYSTEMS.items():
        for objective in get_args(Objective):
            for horizon in HORIZONS:
                system = make()
                found = measured(system, trained(system, 1 - 1 / horizon, updates, objective=objective))
                print(
                    f"| {name} | {objective} | {horizon} | {' | '.join(f'{value:.3f}' for value in found.values())} |",
                    flush=True,
                )
