"""Deciding for many: all that asked while a decision was being made are decided together, in one forward pass."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from deflow.errors import UserError
from deflow.policy import AnyPolicy

REMEMBERED = 10_000  # decisions, for their quantiles


class Answer(NamedTuple):
    """The answer to one observation."""

    actions: np.ndarray  # (horizon, action_dim), float32, in the environment's units
    batch: int  # observations that were decided together
    milliseconds: float  # since it was asked for, waiting included


class _Asked(NamedTuple):
    observation: np.ndarray
    noise: np.ndarray
    since: float  # seconds
    decided: asyncio.Future[Answer]


class Batcher:
    """Decides in a thread of its own, so that observations are received in the meantime.

    Nothing waits for company: whoever asks while the policy is idle is decided for at once.

    Args:
        policy: decides by its `plan`.
    """

    def __init__(self, policy: AnyPolicy) -> None:
        self.latencies, self.batches = Latencies(), 0
        self._policy = policy
        self._asked: asyncio.Queue[_Asked] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def warm_up(self) -> None:
        """Decide once for nobody: the first decision takes many times what the others do, and on a GPU seconds."""
        spec, rng = self._policy.spec, np.random.default_rng(0)
        observation = np.zeros(spec.observation_shape, np.float32 if spec.image is None else np.uint8)
        await self._in_thread([observation], [self._policy.draw_noise(rng)])

    async def decide(self, observation: np.ndarray, noise: np.ndarray) -> Answer:
        """What the policy does at an observation, with that noise.

        Args:
            observation: shape `spec.observation_shape`, checked.
            noise: as `Policy.draw_noise` gives it.

        Raises:
            UserError: if the actions are not finite.
        """
        decided = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(_Asked(observation, noise, time.perf_counter(), decided))
        decision = await decided
        if not np.isfinite(decision.actions).all():
            raise UserError("the policy's actions for this observation are NaN or infinite: it is far from the data")
        return decision

    async def work(self) -> None:
        """Decide for those who ask, until cancelled."""
        try:
            while True:
                together = [await self._asked.get()]
                while not self._asked.empty():
                    together.append(self._asked.get_nowait())
                await self._decide(together)
        finally:
            self._thread.shutdown(wait=False)

    async def _decide(self, together: list[_Asked]) -> None:
        try:
            plans = await self._in_thread([a.observation for a in together], [a.noise for a in together])
        except Exception as error:
            for asked in together:
                asked.decided.set_exception(error)
            return
        self.batches += 1
        now = time.perf_counter()
        for asked, actions in zip(together, plans, strict=True):
            milliseconds = 1e3 * (now - asked.since)
            self.latencies.add(milliseconds)
            asked.decided.set_result(Answer(actions, len(together), milliseconds))

    async def _in_thread(self, observations: list[np.ndarray], noise: list[np.ndarray]) -> np.ndarray:
        plan = self._policy.plan
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: plan(np.stack(observations), np.stack(noise))
        )


class Latencies:
    """Quantiles of the last `REMEMBERED` durations, at the cost of microseconds a duration."""

    def __init__(self) -> None:
        self.count = 0  # of all there were
        self._in_time: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, duration: float) -> None:
        """One more."""
        self.count += 1
        self._in_time.append(duration)
        insort(self._sorted, duration)
        if len(self._in_time) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._in_time.popleft())]

    def quantile(self, share: float) -> float:
        """The duration that so large a share of them do not exceed; there must be one."""
        return self._sorted[min(int(share * len(self._sorted)), len(self._sorted) - 1)]
