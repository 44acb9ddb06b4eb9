"""Where an SRPO policy falls short: its values, its model of the behaviour, or what it has made of them.

    python studies/score.py CHECKPOINT ...      # final.ckpt of a stage of the policy; 16 episodes of each way to act

*Nearest* is how far an action is from the nearest of 32 samples of the behaviour model, a mean over states of the data:
of the data's own action, which says how good the model is, and of the policy's. Success is that of the policy, of the
best of 32 samples by the same values, which needs no policy, and of the policy's objective, descended in each state by
itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import Tensor

from deflow.agents.srpo import SRPO, TIMES
from deflow.checkpoints import agent_of, load_checkpoint, units_of
from deflow.evaluating import play
from deflow.evaluation.intervals import wilson_interval
from deflow.modules.critic import value_gradient
from deflow.modules.diffusion import EARLIEST, ScoreModel
from deflow.policy import Policy

SAMPLES, STATES, EPISODES = 32, 512, 16
ODE_STEPS = 25  # of a sample
DESCENT_STEPS, DRAWS, RATE = 25, 12, 0.3  # of the objective in one state


@torch.no_grad()
def sampled(behavior: ScoreModel, observations: Tensor, generator: torch.Generator, dim: int) -> Tensor:
    """`SAMPLES` actions in each state, shape (states, samples, dim), by DDIM (arXiv 2010.02502)."""
    rows = observations.repeat_interleave(SAMPLES, 0)
    x = torch.randn(len(rows), dim, generator=generator)
    times = torch.linspace(TIMES[1] ** 0.5, EARLIEST**0.5, ODE_STEPS + 1).square()  # most where the noise ends
    for now, then in pairwise(times):
        (signal, sigma), (next_signal, next_sigma) = (behavior.levels(t.expand(len(rows), 1)) for t in (now, then))
        clean = (x - sigma * behavior.noise(rows, x, now.expand(len(rows), 1))) / signal
        clean = clean.clamp(-1, 1)
        x = next_signal * clean + next_sigma * (x - signal * clean) / sigma
    return x.clamp(-1, 1).view(len(observations), SAMPLES, dim)


class Alternatives:
    """Ways to act by the parts of an agent that are not its policy."""

    def __init__(self, agent: SRPO) -> None:
        self.agent, self.generator = agent, torch.Generator().manual_seed(0)

    def samples(self, observations: Tensor) -> Tensor:
        return sampled(self.agent.behavior, observations, self.generator, self.agent.spec.action_dim)

    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.agent.critic.target_values(observations, actions).mean(0)

    @torch.no_grad()
    def best_sample(self, observations: Tensor) -> Tensor:
        samples = self.samples(observations)
        values = self.value(observations.repeat_interleave(SAMPLES, 0), samples.flatten(0, 1))
        return samples[torch.arange(len(samples)), values.view(len(samples), SAMPLES).argmax(1)]

    @torch.no_grad()
    def descended(self, observations: Tensor) -> Tensor:
        """Where the policy's objective, see `ScoreActor`, leads from the mean of the samples."""
        actions = self.samples(observations).mean(1)
        first, last = TIMES
        for step in range(DESCENT_STEPS):
            spread = torch.rand(len(observations), DRAWS, generator=self.generator)  # one time in each twelfth
            times = (first + (last - first) * (torch.arange(DRAWS) + spread) / DRAWS).view(-1, 1)
            z = torch.randn(len(times), actions.shape[-1], generator=self.generator)
            rate = RATE * (1 - step / DESCENT_STEPS)
            actions = (actions - rate * self.slope(observations, actions, times, z)).clamp(-1, 1)
        return actions

    def slope(self, observations: Tensor, actions: Tensor, times: Tensor, z: Tensor) -> Tensor:
        """Gradient of the policy's objective by the action of each state, a mean over its several `times` and `z`."""
        actor, behavior, draws = self.agent.actor, self.agent.behavior, len(times) // len(actions)
        signal, sigma = behavior.levels(times)
        noisy = signal * actions.repeat_interleave(draws, 0) + sigma * z
        noise = behavior.noise(observations.repeat_interleave(draws, 0), noisy, times) - z
        score = (sigma.square() * noise).view(len(actions), draws, -1).mean(1)
        uphill, _ = value_gradient(self.value, observations, actions)
        return score - actor.beta * uphill


def measured(path: Path, episodes: int = EPISODES) -> str:
    """A line of the table."""
    checkpoint = load_checkpoint(path)
    agent = agent_of(checkpoint)
    spec = agent.spec
    if not isinstance(agent, SRPO) or agent.actor.normalise or spec.horizon > 1 or len(spec.observation_shape) > 1:
        raise SystemExit(f"{path} is not of agent=srpo with agent.actor.normalise=false, on states, with horizon=1")
    agent.freeze()
    source, others = instantiate(checkpoint["deflow"]["config"]["data"]["source"]), Alternatives(agent)

    data, _ = source.load()
    rows = data.starts[torch.randperm(len(data.starts), generator=others.generator)[:STATES]]
    observations, actions = data.observations(rows), data.decisions(rows)
    samples = others.samples(observations)
    nearest = [
        f"{(chosen[:, None] - samples).norm(dim=-1).amin(1).mean():.2f}"
        for chosen in (actions, agent.actor(observations))
    ]
    ways: Sequence[Callable[[Tensor], Tensor]] = (agent.actor, others.best_sample, others.descended)
    shares = [success(agent, way, checkpoint, source, episodes) for way in ways]
    return f"| {path} | {agent.actor.beta:g} | {' | '.join([*nearest, *shares])} |"


def success(agent: SRPO, way: Callable[[Tensor], Tensor], checkpoint: dict, source: object, episodes: int) -> str:
    """Of acting in that way, with its interval."""
    agent.act = lambda observations, z: way(observations)  # type: ignore[method-assign]
    found = play(Policy(agent, units=units_of(checkpoint)), source, episodes, 2, 0)["success"]  # type: ignore[arg-type]
    low, high = wilson_interval(found * episodes, episodes)
    return f"{found:.2f} ({low:.2f} to {high:.2f})"


def main(paths: Sequence[Path], episodes: int = EPISODES) -> None:
    torch.set_num_threads(1)
    print("| checkpoint | beta | nearest, data | nearest, policy | policy | best of 32 | objective |")
    print("|---" * 7 + "|")
    for path in paths:
        print(measured(path, episodes), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main([Path(path) for path in sys.argv[1:]])
