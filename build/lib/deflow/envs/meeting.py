"""The environment is met before anything is trained: whether it fits the data is said then, and not hours later."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from deflow.envs.success import KNOWN, SuccessRule
from deflow.errors import UserError
from deflow.types import Spec

log = logging.getLogger(__name__)

LONGEST = 10_000  # steps within which an episode without a limit must end


def meet(env: gymnasium.Env, spec: Spec, rule: SuccessRule, name: str) -> None:
    """Compare an environment with the data, take a step in it, and close it.

    Args:
        env: freshly made.
        spec: sizes of the data.
        rule: how success is read off it.
        name: what to call it.

    Raises:
        UserError: if its observations or actions are of other kinds or sizes than the data's, or its episodes have no
            end.
    """
    try:
        _check_space(env.observation_space, spec.observation_shape, f"{name}: its observations", "the data's")
        _check_space(env.action_space, (spec.action_dim // spec.horizon,), f"{name}: its actions", "the data's")
        observation, _ = env.reset(seed=0)
        if np.shape(observation) != spec.observation_shape:
            raise UserError(f"{name} gives observations of shape {np.shape(observation)}, not {spec.observation_shape}")
        _, reward, _, _, info = _step(env)
        if np.ndim(reward):
            raise UserError(f"{name} gives rewards of shape {np.shape(reward)}: a reward is one number")
        is_said = rule.of_step(info) is not None
        if not is_said or _limit(env) is None:
            is_said |= _play_on(env, rule, name)
        if not is_said:
            keys = rule.key or " or ".join(KNOWN)
            log.warning("%s: success is not measured, info has no %s (see data.source.success_key)", name, keys)
    finally:
        env.close()


def _step(env: gymnasium.Env) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
    space = env.action_space
    assert isinstance(space, Box)
    return env.step(np.clip(np.zeros(space.shape, space.dtype), space.low, space.high))


def _check_space(space: gymnasium.Space, shape: tuple[int, ...], what: str, whose: str) -> None:
    if not isinstance(space, Box):
        raise UserError(f"{what} are a {type(space).__name__}, {whose} are arrays of shape {shape}")
    if space.shape != shape:
        raise UserError(f"{what} have the shape {space.shape}, {whose} {shape}")


def _limit(env: gymnasium.Env) -> int | None:
    return env.spec.max_episode_steps if env.spec is not None else None


def _play_on(env: gymnasium.Env, rule: SuccessRule, name: str) -> bool:
    """Play an episode to its end; whether the environment says at any time if it succeeded."""
    is_said = False
    for _ in range(_limit(env) or LONGEST):
        _, _, terminated, truncated, info = _step(env)
        is_said |= rule.of_step(info) is not None
        if terminated or truncated:
            return is_said
    if _limit(env) is None:
        raise UserError(f"an episode of {name} has no end within {LONGEST} steps: set data.source.max_episode_steps")
    return is_said
