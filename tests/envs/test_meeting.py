"""The environment is met before anything is trained."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import TimeLimit

from deflow.envs.meeting import meet
from deflow.envs.success import SuccessRule
from deflow.errors import UserError
from deflow.types import Spec

SPEC = Spec(3, 2)
OBSERVATIONS, ACTIONS = Box(-np.inf, np.inf, (3,), np.float32), Box(-1, 1, (2,), np.float32)


class Robot(gymnasium.Env):
    """Ends after five steps; `says` is what it says of success at each."""

    def __init__(self, says: list[dict[str, Any]] | None = None, length: int | None = 5, **spaces: Any) -> None:
        self.observation_space = spaces.get("observations", OBSERVATIONS)
        self.action_space = spaces.get("actions", ACTIONS)
        self.says, self.length, self.reward = says or [{}] * 5, length, spaces.get("reward", 0.0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return np.zeros(self.observation_space.shape or (), np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict]:
        self.steps += 1
        info = self.says[min(self.steps, len(self.says)) - 1]
        return np.zeros(3, np.float32), self.reward, self.steps == self.length, False, info


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (Robot(observations=Dict(observation=OBSERVATIONS)), "its observations are a Dict, the data's are arrays"),
        (Robot(observations=Box(-1, 1, (4,))), r"its observations have the shape \(4,\), the data's \(3,\)"),
        (Robot(actions=Discrete(4)), "its actions are a Discrete, the data's are arrays"),
        (Robot(actions=Box(-1, 1, (3,))), r"its actions have the shape \(3,\), the data's \(2,\)"),
        (Robot(reward=np.zeros(1)), r"gives rewards of shape \(1,\)"),
        (Robot(length=None), "has no end within 10000 steps: set data.source.max_episode_steps"),
    ],
)
def test_what_does_not_fit_is_said(env: gymnasium.Env, says: str) -> None:
    with pytest.raises(UserError, match=says):
        meet(env, SPEC, SuccessRule(), "mine")


def test_chunks_are_of_single_actions() -> None:
    meet(Robot([{"success": 1}]), SPEC.chunked(4), SuccessRule(), "mine")


@pytest.mark.parametrize(
    ("says", "rule", "is_measured"),
    [
        ([{"success": 0}], SuccessRule(), True),
        ([{"is_success": 0}], SuccessRule(), True),
        ([{}, {}, {}, {}, {"success": 1}], SuccessRule(), True),
        ([{"solved": 1}], SuccessRule(), False),
        ([{"solved": 1}], SuccessRule("solved"), True),
        ([{"success": 1}], SuccessRule("solved"), False),
    ],
)
def test_whether_success_is_measured(
    says: list[dict[str, Any]], rule: SuccessRule, is_measured: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        meet(TimeLimit(Robot(says), 5), SPEC, rule, "mine")
    assert ("success is not measured" in caplog.text) != is_measured


@pytest.mark.parametrize(
    ("said", "at_the_end", "ever"),
    [
        ([{}, {}], None, None),
        ([{"success": 1.0}, {"success": 0.0}], 0.0, 1.0),
        ([{"success": False}, {"is_success": True}], 1.0, 1.0),
        ([{"success": np.array([True])}, {}], 1.0, 1.0),
    ],
)
def test_success_at_the_end_or_ever(said: list[dict[str, Any]], at_the_end: float | None, ever: float | None) -> None:
    for rule, expected in ((SuccessRule(), at_the_end), (SuccessRule(ever=True), ever)):
        success = None
        for info in said:
            success = rule.after(success, info)
        assert success == expected


def test_the_step_that_is_taken_is_one_of_its_actions() -> None:
    class Strict(Robot):
        def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict]:
            assert self.action_space.contains(action)
            return super().step(action)

    meet(Strict([{"success": 1}], actions=Box(0.5, 1, (2,), np.float32)), SPEC, SuccessRule(), "mine")
