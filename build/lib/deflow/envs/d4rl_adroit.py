"""D4RL's Adroit tasks in gymnasium-robotics' models of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import gymnasium_robotics
import numpy as np

gymnasium.register_envs(gymnasium_robotics)


@dataclass(frozen=True)
class Outcome:
    """What a step came to: `success` is D4RL's `goal_achieved`."""

    reward: float
    success: bool
    terminated: bool = False


def pen(data: Any) -> Outcome:
    """Turn the pen to the target's direction; a pen that drops below 0.075 m ends the episode.

    Args:
        data: the simulator's, after the step (positions in metres).
    """
    position = data.body("Object").xpos
    distance = _distance(position, data.site("eps_ball").xpos)
    alignment = float(_direction(data, "object") @ _direction(data, "target"))
    close, closer = (distance < 0.075 and alignment > cosine for cosine in (0.9, 0.95))
    dropped = position[2] < 0.075
    return Outcome(alignment - distance + 10 * close + 50 * closer - 5 * dropped, closer, dropped)


def door(data: Any) -> Outcome:
    """Open the door by 1.35 rad. `data` as in `pen`."""
    angle = data.joint("door_hinge").qpos[0]
    reach = _distance(data.site("S_grasp").xpos, data.site("S_handle").xpos)
    cost = 0.1 * reach + 0.1 * (angle - 1.57) ** 2 + 1e-5 * np.sum(data.qvel**2)
    return Outcome(-cost + 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35), angle >= 1.35)


def hammer(data: Any) -> Outcome:
    """Drive the nail in to within 0.01 m. `data` as in `pen`."""
    held, tool, nail = data.body("Object").xpos, data.site("tool").xpos, data.site("S_target").xpos
    depth = _distance(nail, data.site("nail_goal").xpos)
    reach = _distance(data.site("S_grasp").xpos, held)
    cost = 0.1 * reach + _distance(tool, nail) + 10 * depth + 0.01 * np.linalg.norm(data.qvel)
    lifted = held[2] > 0.04 and tool[2] > 0.04
    return Outcome(-cost + 2 * lifted + 25 * (depth < 0.02) + 75 * (depth < 0.01), depth < 0.01)


def relocate(data: Any) -> Outcome:
    """Carry the ball to within 0.1 m of the target. `data` as in `pen`."""
    ball, palm, target = data.body("Object").xpos, data.site("S_grasp").xpos, data.site("target").xpos
    distance = _distance(ball, target)
    reward = -0.1 * _distance(palm, ball) + 10 * (distance < 0.1) + 20 * (distance < 0.05)
    if ball[2] > 0.04:  # off the table
        reward += 1 - 0.5 * _distance(palm, target) - 0.5 * distance
    return Outcome(reward, distance < 0.1)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other))


def _direction(data: Any, name: str) -> np.ndarray:
    along = data.site(f"{name}_top").xpos - data.site(f"{name}_bottom").xpos
    return along / np.linalg.norm(along)


TASKS: dict[str, tuple[str, Callable[[Any], Outcome]]] = {
    "pen": ("AdroitHandPen-v1", pen),
    "door": ("AdroitHandDoor-v1", door),
    "hammer": ("AdroitHandHammer-v1", hammer),
    "relocate": ("AdroitHandRelocate-v1", relocate),
}


class Adroit(gymnasium.Wrapper):
    """One of the four tasks, with the rewards and ends of D4RL's `pen-v1`, `door-v1`, `hammer-v1` or `relocate-v1`.

    Source: `d4rl/hand_manipulation_suite/{pen,door,hammer,relocate}_v0.py` (arXiv 2004.07219). The hand, the actions
    (a share of each joint's range), the observations, the starts and the 0.01 s of an action are gymnasium-robotics',
    and the same; its rewards are not (it pays for the hand's distance to what it should reach), nor does it end.

    Args:
        task: a key of `TASKS`.
        max_episode_steps: after which an episode is cut.
        kwargs: Gymnasium's rendering arguments.
    """

    def __init__(self, task: str, max_episode_steps: int, **kwargs: Any) -> None:
        name, self._outcome = TASKS[task]
        super().__init__(gymnasium.make(name, max_episode_steps=max_episode_steps, **kwargs))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, _, _, truncated, _ = self.env.step(action)
        outcome = self._outcome(self.env.unwrapped.data)  # type: ignore[attr-defined]
        info = {"success": bool(outcome.success)}
        return observation, float(outcome.reward), bool(outcome.terminated), truncated, info
