"""Collecting: the policy plays, and what it meets becomes transitions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from deflow import distributed
from deflow.agents.base import Agent
from deflow.data.memory.transitions import ACTION_BOUND, returns_to_go
from deflow.envs.success import AT_THE_END, SuccessRule
from deflow.errors import UserError
from deflow.evaluation.rollout import Episode, Seat, decide, take_seat
from deflow.policy import Policy
from deflow.seeding import fold_seed
from deflow.types import Batch, Lookahead
from deflow.units import AS_THEY_ARE, Units

log = logging.getLogger(__name__)


@dataclass
class _Window:
    """A transition under way: the decision, the return since, and what stands at its end once it is known."""

    observation: np.ndarray
    action: np.ndarray
    start: int  # step of the episode
    return_so_far: float = 0.0
    discount: float = 1.0  # of the next reward; in the end, of the next observation's value
    steps: int = 0
    next_observation: np.ndarray | None = None
    next_action: np.ndarray | None = None  # what was decided there; at an episode's end the last action again
    return_to_go: float = 0.0  # of the whole episode from here on, once it is known and if it is asked for


@dataclass
class _Player:
    """A seat in an environment, with the transitions of its episode that are under way or not yet given."""

    seat: Seat
    plans: list[np.ndarray] = field(default_factory=list)  # decided in this episode, each (horizon, action_dim)
    windows: list[_Window] = field(default_factory=list)  # that reward is still added to
    ended: list[_Window] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def begin_window(self) -> None:
        """Begin a transition with the plan that was just decided, which is what those that ended here waited for."""
        self.plans.append(np.stack(self.seat.plan))
        action = self.plans[-1].reshape(-1)
        self.follow_with(action)
        self.windows.append(_Window(self.seat.observation, action, start=len(self.rewards)))

    def follow_with(self, action: np.ndarray) -> None:
        """Let `action` be the next one of the transitions that ended and have none yet."""
        for window in self.ended:
            if window.next_action is None:
                window.next_action = action

    def take(self) -> list[_Window]:
        """The transitions that are whole, which are then given."""
        whole = [window for window in self.ended if window.next_action is not None]
        self.ended = [window for window in self.ended if window.next_action is None]
        return whole


class Collector:
    """Plays the policy in environments side by side and gives finished transitions.

    The policy explores in the agent's way. The end of a task sets a transition's discount to 0; a time limit ends the
    episode and leaves the discount. A transition is given when its next action is decided, or its episode is over; to
    an agent that reads returns always when its episode is over.

    Args:
        make_env: makes one environment.
        agent: plays, as it is at each step.
        num_envs: environments, each with an episode of its own.
        span: of each transition.
        label: what the source calls the environment's reward.
        seed: of resets and the policy's noise.
        success: how success is read off the environment.
        units: of the environment; transitions are in those of the networks.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        agent: Agent,
        num_envs: int,
        span: Lookahead,
        label: Callable[[float], float],
        seed: int,
        success: SuccessRule = AT_THE_END,
        units: Units = AS_THEY_ARE,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"the online stage needs at least one environment, got num_envs={num_envs}")
        self.num_envs = num_envs
        self._envs = [make_env() for _ in range(num_envs)]
        self._agent, self._policy, self._span = agent, Policy(agent, explore=True, units=units), span
        self._label, self._seed, self._success = label, seed, success
        self._players: list[_Player] = []
        self.episodes = 0  # begun
        self.finished: list[Episode] = []  # since they were last asked for

    def step(self) -> Batch:
        """One step in every environment; the transitions that it finished."""
        if not self._players:
            self._players = [_Player(self._next_seat(env)) for env in self._envs]
        deciding = [player for player in self._players if not player.seat.plan]
        decide(self._policy, [player.seat for player in deciding])
        for player in deciding:
            player.begin_window()
        finished = [transition for player in self._players for transition in self._step(player)]
        return _batch(finished, self._agent, self._policy.units)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: the counts, and of each episode under way its number and its decisions."""
        return {
            "episodes": self.episodes,
            "finished": [[e.index, e.success, e.episode_return, e.length] for e in self.finished],
            "players": [_under_way(player) for player in self._players],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was made, by playing the episodes under way again up to there.

        An environment that does not come out where it was (it is not the same for the same seed and actions) begins a
        new episode, which is said.
        """
        self.episodes = state["episodes"]
        self._players = [self._play_again(env, of) for env, of in zip(self._envs, state["players"], strict=False)]
        self.finished = [Episode(*values) for values in state["finished"]]

    def _play_again(self, env: gymnasium.Env, state: dict[str, Any]) -> _Player:
        player = _Player(self._seat(env, state["episode"]))
        seat = player.seat
        for plan in state["plans"].numpy():
            self._policy.draw_noise(seat.rng)  # as the decision did
            seat.plan.extend(plan)
            player.begin_window()
            while seat.plan and player.seat is seat and len(player.rewards) < state["steps"]:
                self._step(player)  # its transitions are in the replay
        if player.seat is seat and np.array_equal(seat.observation, state["observation"].numpy()):
            return player
        log.warning("episode %d did not come out where it was: a new one takes its place", state["episode"])
        return _Player(self._next_seat(env))

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _next_seat(self, env: gymnasium.Env) -> Seat:
        self.episodes += 1
        return self._seat(env, self.episodes)

    def _seat(self, env: gymnasium.Env, episode: int) -> Seat:
        return take_seat(env, fold_seed(self._seed, "online", distributed.rank()), episode)

    def _step(self, player: _Player) -> list[_Window]:
        """Step one environment; the transitions that can be given."""
        seat, action = player.seat, player.seat.plan.popleft()
        seat.observation, reward, terminated, truncated, info = seat.env.step(action)
        seat.episode.episode_return += float(reward)
        seat.episode.length += 1
        player.rewards.append(self._policy.units.learned(self._label(float(reward))))
        for window in player.windows:
            window.return_so_far += window.discount * player.rewards[-1]
            window.discount *= self._span.discount
            window.steps += 1
        self._end_windows(player, terminated, truncated)
        seat.episode.success = self._success.after(seat.episode.success, info)
        if not (terminated or truncated):
            return [] if self._agent.traits.reads_returns else player.take()
        player.follow_with(np.tile(action, self._span.horizon))
        if self._agent.traits.reads_returns:
            self._add_returns(player, terminated)
        self.finished.append(seat.episode)
        player.seat, player.plans, player.rewards = self._next_seat(seat.env), [], []
        return player.take()

    def _end_windows(self, player: _Player, terminated: bool, truncated: bool) -> None:
        """Move the transitions that end with this step to those that ended; a chunk that is cut off is dropped."""
        ends_all = terminated or (truncated and self._span.horizon == 1)
        for window in player.windows:
            if ends_all or window.steps == self._span.steps:
                window.discount = 0.0 if terminated else window.discount
                window.next_observation = player.seat.observation
                player.ended.append(window)
        under_way = [window for window in player.windows if window.next_observation is None]
        player.windows = [] if terminated or truncated else under_way

    def _add_returns(self, player: _Player, terminated: bool) -> None:
        """The return that the episode, which is over, earned from each of its transitions on."""
        last = len(player.rewards) - 1
        ends = [step == last for step in range(last + 1)]
        masks = [0.0 if end and terminated else 1.0 for end in ends]
        returns = returns_to_go(player.rewards, masks, ends, self._span.discount)
        for window in player.ended:
            window.return_to_go = returns[window.start]


def _under_way(player: _Player) -> dict[str, Any]:
    """An episode in plain values, from which it can be played again."""
    return {
        "episode": player.seat.episode.index,
        "steps": len(player.rewards),
        "plans": torch.from_numpy(np.array(player.plans, np.float32)),
        "observation": torch.from_numpy(np.array(player.seat.observation)),
    }


def _batch(windows: list[_Window], agent: Agent, units: Units) -> Batch:
    spec = agent.spec

    def rows(values: list[Any], *shape: int, dtype: type = np.float32) -> Tensor:
        return torch.from_numpy(np.array(values, dtype).reshape(-1, *shape))

    def seen(values: list[Any]) -> Tensor:
        if spec.image is not None:
            return rows(values, *spec.observation_shape, dtype=np.uint8)
        return torch.from_numpy(units.observed(rows(values, *spec.observation_shape).numpy()))

    def taken(values: list[Any]) -> Tensor:
        single = rows(values, spec.horizon, spec.action_dim // spec.horizon).numpy()
        return torch.from_numpy(units.decided(single)).flatten(1).clamp(-ACTION_BOUND, ACTION_BOUND)

    return Batch(
        seen([window.observation for window in windows]),
        taken([window.action for window in windows]),
        rows([window.return_so_far for window in windows]),
        rows([window.discount for window in windows]),
        seen([window.next_observation for window in windows]),
        taken([window.next_action for window in windows]),
        returns=rows([window.return_to_go for window in windows]) if agent.traits.reads_returns else None,
    )
