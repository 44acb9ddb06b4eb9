"""Batched evaluation: exactly the episodes that playing them one by one would give."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from deflow.build import build_agent
from deflow.envs import ogbench
from deflow.envs.success import SuccessRule
from deflow.errors import UserError
from deflow.evaluation.intervals import bootstrap_interval
from deflow.evaluation.rollout import Episode, Evaluator
from deflow.evaluation.statistics import summarise
from deflow.policy import Policy
from deflow.types import Spec
from tests.agents.tester import Acting
from tests.conftest import compose_config

TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def make_env():
    return ogbench.make_env(TASK, max_episode_steps=60)


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    config = compose_config("experiment=pointmaze", "networks.hidden=[16,16]", "agent.best_of_n=2")
    return Policy(build_agent(config.agent, ogbench.spec_of(make_env())))


def test_equals_the_sequential_loop(policy: Policy) -> None:
    batched = Evaluator(make_env, episodes=7, num_envs=3, seed=5).run(policy)
    one_by_one = Evaluator(make_env, episodes=7, num_envs=1, seed=5).run(policy)
    assert [e.index for e in batched] == list(range(7))
    for a, b in zip(batched, one_by_one, strict=True):
        assert (a.success, a.length, a.episode_return) == (b.success, b.length, b.episode_return)
        # A matrix product rounds differently in a batch of another size.
        assert np.allclose(a.path, b.path, atol=1e-4)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_chunks_are_executed_open_loop(num_envs: int) -> None:
    decided = []

    class Counting(Acting):
        """A policy whose chunks tell when they were decided."""

        def act(self, observations, z):
            assert z.shape == (len(observations), 6)
            decided.append(len(observations))
            return torch.linspace(-1, 1, 6).expand(len(observations), 6)

    taken = []

    class Recorder(gymnasium.Wrapper):
        def step(self, action):
            taken.append(tuple(np.round(action, 1)))
            return self.env.step(action)

    policy = Policy(Counting(Spec(4, 6, horizon=3)))
    Evaluator(lambda: Recorder(make_env()), episodes=3, num_envs=num_envs, seed=0).run(policy)
    assert sum(decided) == 3 * 20  # 60 steps an episode
    assert taken[::num_envs][:3] == [(-1.0, -0.6), (-0.2, 0.2), (0.6, 1.0)]


@pytest.mark.parametrize(("rule", "success"), [(SuccessRule(), 0.0), (SuccessRule(ever=True), 1.0)])
def test_success_is_that_of_the_end_unless_asked_otherwise(rule: SuccessRule, success: float) -> None:
    class Passing(gymnasium.Wrapper):
        """Says that the goal is reached in the fifth step alone."""

        def reset(self, **settings):
            self.steps = 0
            return self.env.reset(**settings)

        def step(self, action):
            self.steps += 1
            *step, info = self.env.step(action)
            return *step, info | {"success": float(self.steps == 5)}

    class Resting(Acting):
        def act(self, observations, z):
            return torch.zeros_like(z)

    evaluator = Evaluator(lambda: Passing(make_env()), episodes=1, num_envs=1, seed=0, success=rule)
    assert [episode.success for episode in evaluator.run(Policy(Resting(Spec(4, 2))))] == [success]


def test_a_second_evaluation_repeats_the_first(policy: Policy) -> None:
    evaluator = Evaluator(make_env, episodes=4, num_envs=2, seed=0)
    assert evaluator.run(policy) == evaluator.run(policy)


def test_the_seed_matters(policy: Policy) -> None:
    paths = [Evaluator(make_env, 1, 1, seed).run(policy)[0].path for seed in (0, 1)]
    assert paths[0] != paths[1]


def test_environments_of_different_lengths_give_every_episode_once(policy: Policy, monkeypatch) -> None:
    lengths = iter([5, 60, 60, 5, 5, 5, 5])
    step = Evaluator._step

    def cut(self, seat, action):  # each environment's episodes end after their own number of steps
        seat.limit = getattr(seat, "limit", None) or next(lengths)
        return step(self, seat, action) or seat.episode.length >= seat.limit

    monkeypatch.setattr(Evaluator, "_step", cut)
    episodes = Evaluator(make_env, episodes=7, num_envs=3, seed=0).run(policy)
    assert [e.index for e in episodes] == list(range(7))
    assert sorted(e.length for e in episodes) == [5, 5, 5, 5, 5, 60, 60]


@pytest.mark.parametrize("episodes,num_envs", [(0, 1), (1, 0)])
def test_counts_must_be_positive(episodes: int, num_envs: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        Evaluator(make_env, episodes, num_envs, seed=0)


@pytest.mark.parametrize("success, low, high", [(0.0, 0.0, 0.071), (1.0, 0.929, 1.0)])
def test_success_has_an_interval_where_all_episodes_agree(success: float, low: float, high: float) -> None:
    summary = summarise([Episode(number, success, -3.0, 4) for number in range(50)])
    assert (summary["success_low"], summary["success_high"]) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize("successes, low, high", [(0, 0.0, 7.1), (10, 11.2, 33.0)])
def test_a_score_that_is_success_in_percent_has_its_interval(successes: int, low: float, high: float) -> None:
    episodes = [Episode(number, float(number < successes), float(number < successes), 4) for number in range(50)]
    summary = summarise(episodes, lambda earned: 100 * earned)
    assert (summary["score_low"], summary["score_high"]) == pytest.approx((low, high), abs=0.05)


def test_another_score_has_a_bootstraps_interval() -> None:
    episodes = [Episode(number, float(number < 10), float(number < 10), 4) for number in range(50)]
    summary = summarise(episodes, lambda earned: 50 * earned)
    assert (summary["score_low"], summary["score_high"]) == tuple(
        50 * end for end in bootstrap_interval([1.0] * 10 + [0.0] * 40)
    )


def test_summary() -> None:
    summary = summarise([Episode(0, 1.0, -3.0, 4), Episode(1, 0.0, -7.0, 8)])
    assert (summary["success"], summary["return"], summary["length"], summary["episodes"]) == (0.5, -5.0, 6.0, 2)
