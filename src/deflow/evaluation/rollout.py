"""Episodes of a policy in many environments at once, equal to playing them one by one."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gymnasium
import numpy as np

from deflow import distributed
from deflow.cores import usable_cores
from deflow.envs.ogbench import seeded_reset
from deflow.envs.success import AT_THE_END, SuccessRule
from deflow.errors import UserError
from deflow.files import replacing
from deflow.policy import AnyPolicy
from deflow.seeding import fold_seed

log = logging.getLogger(__name__)


@dataclass
class Episode:
    """What an episode came to.

    `success` is None where the environment does not say, see `SuccessRule`; `path` holds the agent's x, y in a maze;
    `path_error` is of a policy that expects states: the root mean square of how far those that were reached are from
    them, in standard deviations of what so many steps change in the data.
    """

    index: int
    success: float | None = None
    episode_return: float = 0.0
    length: int = 0
    path: list[tuple[float, float]] = field(default_factory=list)
    path_error: float | None = None


def save_episodes(episodes: Sequence[Episode], path: Path) -> None:
    """Write what the episodes came to, with their paths, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps([asdict(episode) for episode in episodes]))


def load_episodes(path: Path) -> list[Episode]:
    """What `save_episodes` wrote; none if there is no such file, or (which is said) a damaged one."""
    if not path.exists():
        return []
    try:
        episodes = [Episode(**values) for values in json.loads(path.read_bytes())]
        if all(np.array(episode.path, float).reshape(-1, 2).size for episode in episodes if episode.path):
            return episodes
    except (ValueError, TypeError):
        pass
    log.warning("%s is damaged: the report will lack the paths of the last evaluation", path)
    return []


@dataclass(eq=False)
class Seat:
    """An environment and the episode that is being played in it."""

    env: gymnasium.Env
    episode: Episode
    observation: np.ndarray
    rng: np.random.Generator
    plan: deque[np.ndarray] = field(default_factory=deque)  # actions decided and not yet taken
    expected: deque[np.ndarray] = field(default_factory=deque)  # the states after them and their scales, (2, dim) each
    squares: float = 0.0  # mean squares of the errors, summed over the episode so far


def take_seat(env: gymnasium.Env, seed: int, index: int) -> Seat:
    """Begin episode `index` of `seed` in `env`."""
    seed = fold_seed(seed, "episode", index)
    observation, _ = seeded_reset(env, seed % 2**31)
    return Seat(env, Episode(index), observation, np.random.default_rng(seed))


def decide(policy: AnyPolicy, seats: Sequence[Seat]) -> None:
    """Plan the next actions of those `seats` that have none left, with one call of the policy."""
    seats = [seat for seat in seats if not seat.plan]
    if not seats:
        return
    noise = np.stack([policy.draw_noise(seat.rng) for seat in seats])
    observations = np.stack([seat.observation for seat in seats])
    for seat, plan in zip(seats, policy.plan(observations, noise), strict=True):
        seat.plan.extend(plan)
    foresight = policy.foresee(observations, noise)
    if foresight is not None:
        expected, scale = foresight
        for seat, states in zip(seats, expected, strict=True):
            seat.expected.extend(np.stack([states, scale], axis=1))


def compare(policy: AnyPolicy, seat: Seat) -> None:
    """Note how far the state that was reached is from the one that was expected, if one was."""
    if seat.expected:
        expected, scale = seat.expected.popleft()
        seat.squares += np.square((policy.units.observed(seat.observation) - expected) / scale).mean().item()
        seat.episode.path_error = math.sqrt(seat.squares / seat.episode.length)


class Evaluator:
    """Plays exactly `episodes` episodes and keeps its environments for the next time.

    Episode `i` is a function of the policy and of `(seed, i)` alone: its reset and its noise have generators of
    their own. An environment that finishes takes the next episode not yet begun; none is cut short and none is
    repeated, so that short episodes are not over-represented. Under DDP the episodes are split over the ranks.

    Args:
        make_env: makes one environment.
        episodes: to play, in all.
        num_envs: environments stepped side by side, one batched policy call for all; None is one more than the cores
            that this process may use, so that none waits for another.
        seed: of resets and policy noise.
        success: how success is read off the environment.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        episodes: int,
        num_envs: int | None,
        seed: int,
        success: SuccessRule = AT_THE_END,
    ) -> None:
        num_envs = usable_cores() + 1 if num_envs is None else num_envs
        if episodes < 1 or num_envs < 1:
            raise UserError(f"episodes and num_envs must be at least 1, got {episodes} and {num_envs}")
        self._make_env, self._success = make_env, success
        self.episodes, self.num_envs, self.seed = episodes, num_envs, seed
        self._envs: list[gymnasium.Env] = []

    def run(self, policy: AnyPolicy) -> list[Episode]:
        """All episodes in order of their index, on every rank."""
        mine = range(distributed.rank(), self.episodes, distributed.world_size())
        with policy.deciding():
            played = self._play(policy, mine)
        everyone = [episode for episodes in distributed.gather_objects(played) for episode in episodes]
        return sorted(everyone, key=lambda episode: episode.index)

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()
        self._envs = []

    def _play(self, policy: AnyPolicy, indices: Sequence[int]) -> list[Episode]:
        waiting = iter(indices)
        while len(self._envs) < min(self.num_envs, len(indices)):
            self._envs.append(self._make_env())
        # The environments come first in the zip: exhausted first, they leave the next index waiting.
        seats = [take_seat(env, self.seed, index) for env, index in zip(self._envs, waiting, strict=False)]
        finished = []
        # Threads, not processes: the simulator lets go of Python's lock, and nothing has to be copied.
        # But a renderer belongs to the thread that made it: environments that show images stay in this one.
        threads = usable_cores() if policy.spec.image is None else 1
        with ThreadPoolExecutor(threads) as pool:
            while seats:
                decide(policy, seats)
                for seat, over in zip(tuple(seats), self._step_all(policy, seats, pool, threads), strict=True):
                    if over:
                        finished.append(seat.episode)
                        seats.remove(seat)
                        seats.extend(take_seat(seat.env, self.seed, i) for i in [next(waiting, None)] if i is not None)
        return finished

    def _step_all(self, policy: AnyPolicy, seats: Sequence[Seat], pool: ThreadPoolExecutor, threads: int) -> list[bool]:
        """Step every seat, `threads` at the same time; whose episodes are over."""

        def step(some: Sequence[Seat]) -> list[bool]:
            over = [self._step(seat, seat.plan.popleft()) for seat in some]
            for seat in some:
                compare(policy, seat)
            return over

        share = -(-len(seats) // threads)
        groups = [seats[first : first + share] for first in range(0, len(seats), share)]
        if len(groups) == 1:
            return step(seats)
        return [over for group in pool.map(step, groups) for over in group]

    def _step(self, seat: Seat, action: np.ndarray) -> bool:
        """Step one environment; whether its episode is over."""
        episode, maze = seat.episode, seat.env.unwrapped
        if hasattr(maze, "get_xy"):
            x, y = maze.get_xy()
            episode.path.append((float(x), float(y)))
        seat.observation, reward, terminated, truncated, info = seat.env.step(action)
        episode.episode_return += float(reward)
        episode.length += 1
        episode.success = self._success.after(episode.success, info)
        return terminated or truncated
