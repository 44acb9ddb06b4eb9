"""Trajectories in one pass: what is generated beside the actions, where it comes from, and whether it comes true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from deflow.agents.algorithm import Traits
from deflow.agents.fql import FQL
from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent, path_statistics
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.data.memory.transitions import Transitions
from deflow.errors import UserError
from deflow.evaluation.rollout import Evaluator
from deflow.evaluation.statistics import summarise
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.pipeline import train
from deflow.policy import Policy
from deflow.types import Foresight, Lookahead, Spec
from tests.agents.tester import Acting, check_agent, random_batch
from tests.conftest import CKPT, compose_config, tiny_config

PATH = ("agent=fql", "agent.horizon=4", "agent.path={mean: [0.0], std: [2.0]}")


def make(*overrides: str, spec: Spec | None = None) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, spec or Spec(5, 3))


def counting(rows: int = 20) -> Transitions:
    """A trajectory of states (t, 10 t), and a second one."""
    number = np.arange(rows, dtype=np.float32)
    states = np.concatenate([np.stack([number, 10 * number], 1)] * 2)
    valids = np.concatenate([number < rows - 1] * 2)
    columns = {"rewards": np.zeros(2 * rows), "masks": np.ones(2 * rows), "actions": np.zeros((2 * rows, 1))}
    return Transitions.from_compact(columns | {"observations": states, "valids": valids}, "counting")


def test_several_seeds_are_moved_with_their_statistics() -> None:
    agents = [make(*PATH) for _ in range(2)]
    SeedStack(agents).to("meta")
    assert {buffer.device.type for agent in agents for buffer in agent.buffers()} == {"meta"}


@pytest.mark.parametrize("overrides", [PATH, (*PATH, "agent/critic=floq"), ("agent=fql", PATH[2])])
def test_shared_checks(overrides: tuple[str, ...]) -> None:
    check_agent(make(*overrides))


def test_actions_and_states_come_from_one_noise_vector() -> None:
    agent = make(*PATH)
    observations, z = torch.randn(6, 5), torch.randn(6, 32)
    assert agent.act_noise_shape == (32,)  # 4 actions of 3, and 4 states of 5
    foresight = agent.foresee(observations, z)
    assert foresight.states.shape == (6, 4, 5)
    assert torch.equal(foresight.scale, torch.full((4, 5), 2.0))
    plans = agent.actor(observations, z)
    torch.testing.assert_close(agent.act(observations, z), plans[:, :12].clamp(-1, 1))
    torch.testing.assert_close(foresight.states, observations[:, None] + 2 * plans[:, 12:].reshape(6, 4, 5))
    assert agent.propose(observations, z).shape == (6, 12)
    assert make("agent=fql").foresee(observations, z[:, :3]) is None


def test_what_the_flow_learns() -> None:
    agent = make(*PATH)
    batch = random_batch(agent)
    planned = agent._planned(batch).actions
    assert torch.equal(planned[:, :12], batch.actions)
    torch.testing.assert_close(planned[:, 12:].reshape(16, 4, 5), (batch.path - batch.observations[:, None]) / 2)


def test_states_are_distilled_beside_the_actions() -> None:
    actor = make(*PATH).actor
    observations, z, proposals = torch.randn(6, 5), torch.randn(6, 32), torch.randn(6, 32)
    loss, metrics = actor.loss(observations, z, proposals, lambda s, a: 0 * a.sum(-1)[None])
    squares = (actor(observations, z) - proposals).square()
    torch.testing.assert_close(metrics["distillation"], squares[:, :12].mean() + squares[:, 12:].mean())
    loss.backward()
    of_states = actor.net.layers[-1].bias.grad[12:].clone()
    assert (of_states != 0).all()
    actor.zero_grad()
    actor.loss(observations, z, proposals, lambda s, a: a.sum(-1)[None])[0].backward()
    torch.testing.assert_close(actor.net.layers[-1].bias.grad[12:], of_states)  # the value says nothing of states


def test_states_are_not_clipped_as_actions_are() -> None:
    flow = BehaviorFlow(Spec(2, 3), hidden=(8,))
    flow.action_dim = 1
    proposals = flow.propose(torch.zeros(64, 2), 20 * torch.randn(64, 3))
    assert proposals[:, 0].abs().max() <= 1
    assert proposals[:, 1:].abs().max() > 2


def test_the_states_on_the_way() -> None:
    data = counting()
    batch, _ = data.batch(torch.tensor([0, 5, 21]), Lookahead(0.99, 3, 3, path=True))
    assert batch.path is not None
    assert batch.path[..., 0].tolist() == [[1, 2, 3], [6, 7, 8], [2, 3, 4]]
    assert torch.equal(batch.path[:, -1], batch.next_observations)
    assert data.batch(torch.tensor([0]), Lookahead(0.99, 3, 3))[0].path is None
    statistics = path_statistics(data, 3)
    assert statistics["mean"] == [1, 10, 2, 20, 3, 30]
    assert statistics["std"] == [1, 10, 2, 20, 3, 30]  # of what is always the same its size


def test_expected_states_are_compared_with_those_that_are_reached() -> None:
    class Count(gymnasium.Env[np.ndarray, np.ndarray]):
        """Counts its steps, of which an episode has five."""

        observation_space, action_space = gymnasium.spaces.Box(-9, 9, (1,)), gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            self.steps += 1
            return np.full(1, self.steps, np.float32), 0.0, False, self.steps == 5, {}

    class Expecting(Acting):
        off, traits = 0.0, Traits(reads_path=True)

        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(observations), 2)

        def foresee(self, observations: torch.Tensor, z: torch.Tensor) -> Foresight:
            states = torch.stack([observations + 1 + self.off, observations + 2 - self.off], dim=1)
            return Foresight(states, torch.full((2, 1), 4.0))

    agent = Expecting(Spec(1, 2, horizon=2))
    evaluator = Evaluator(Count, episodes=3, num_envs=2, seed=0)
    assert summarise(evaluator.run(Policy(agent)))["path_error"] == 0
    agent.off = 2.0
    assert summarise(evaluator.run(Policy(agent)))["path_error"] == pytest.approx(0.5)  # two, of a deviation of four
    agent.traits = Traits()
    assert "path_error" not in summarise(evaluator.run(Policy(agent)))


@pytest.mark.usefixtures("short_episodes")
def test_a_run(point_data: Path, tmp_path: Path) -> None:
    config = tiny_config(point_data, "experiment=pointmaze", "agent=fql", "agent.horizon=3", "agent.path=auto")
    summary = train(config, tmp_path)
    assert summary["eval/path_error"]["last"] > 0
    saved = agent_of(load_checkpoint(tmp_path / CKPT))
    assert isinstance(saved, FQL)
    assert saved.path_std.shape == (3, saved.spec.observation_dim)
    assert not torch.equal(saved.path_std[0], saved.path_std[2])


@pytest.mark.parametrize(
    "overrides,spec,message",
    [
        (("agent.path={mean: [0.0, 1.0], std: [1.0]}",), Spec(5, 3), "agent.path.mean needs 5 numbers, got 2"),
        (("agent.path=auto",), Spec(0, 3, image=(1, 64, 64, 3)), "states, not images"),
        (("agent.path=auto", "agent/dynamics=flow", "agent.dynamics.expansion=1"), Spec(5, 3), "imagined steps"),
    ],
)
def test_what_is_refused(overrides: tuple[str, ...], spec: Spec, message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        make("agent=fql", *overrides, spec=spec)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (("agent.path=auto", "stages=offline_to_online"), "learned from data alone"),
        (("agent.path=auto", "agent.horizon=500"), "longer than every trajectory"),
        (("agent.path=yes",), "agent.path must be a group of settings or null or auto"),
    ],
)
def test_what_does_not_fit_a_run(overrides: tuple[str, ...], message: str, point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(point_data, "experiment=pointmaze", "agent=fql", *overrides), tmp_path)
