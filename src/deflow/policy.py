"""Policy: the one room for acting, from observations to actions of the environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deflow.agents.base import Agent
from deflow.errors import UserError
from deflow.seeding import fold_seed
from deflow.types import Spec
from deflow.units import AS_THEY_ARE, Units


class AnyPolicy(ABC):
    """What every policy does, whatever decides: an agent (`Policy`), or what was exported of one (`ExportedPolicy`).

    `act` keeps, for each of the observations side by side, the noise and, with action chunks, the plan that is being
    carried out: one episode after the other, with `reset` between them. Whoever brings noise along calls `plan`, which
    keeps nothing.

    Args:
        seed: of the noise that `act` draws.
        units: of the environment, see `Units`.
    """

    def __init__(self, seed: int, units: Units) -> None:
        self.units = units
        self._plans: list[deque[np.ndarray]] = []  # of each row: actions decided and not yet taken
        self._begin_noise(seed)

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Sizes of observations and actions."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one decision in one state."""

    @abstractmethod
    def plan(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The actions that are decided at once, shape (batch, horizon, action_dim of the environment), float32.

        Args:
            observations: shape (batch, *observation_shape).
            noise: of each row, see `draw_noise`, shape (batch, *noise_shape).
        """

    def foresee(self, observations: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """A `Foresight` of `plan`, given the same arguments, in the networks' units; None if it expects nothing."""
        return None

    def deciding(self) -> AbstractContextManager[None]:
        """A context for many decisions, in which what each of them would set up is set up once."""
        return nullcontext()

    def reset(self, seed: int | None = None, rows: Any = None) -> None:
        """Begin an episode: forget what is left of a plan.

        A vector environment begins episodes at different times: `reset(rows=terminated | truncated)` after the step
        that brought a new episode's first observation. That is the step that ended the old one with gymnasium's
        `AutoresetMode.SAME_STEP`, and with `NEXT_STEP` the one after it, whose action is not carried out.

        Args:
            seed: if given, at least 0, the noise of all rows begins anew, so that the same observations lead to the
                same actions.
            rows: of which observations side by side an episode begins, booleans of shape (batch,); None: of all.

        Raises:
            UserError: if the seed is not a whole number or below 0, if there are not so many rows, or given both.
        """
        if rows is None:
            self._plans = []
            if seed is not None:
                self._begin_noise(seed)
        elif seed is not None:
            raise UserError("a seed begins the noise of all rows: give reset() a seed or rows, not both")
        elif self._plans:
            for row in np.flatnonzero(self._mask(rows)):
                self._plans[row].clear()

    def act(self, observation: Any) -> np.ndarray:
        """The next action of the environment.

        Args:
            observation: shape `spec.observation_shape`; or several side by side, (batch, *observation_shape), such as
                those of a vector environment. Numbers of any type for states, uint8 for images.

        Returns:
            float32 in the environment's units, shape (action_dim,), or (batch, action_dim). Each row has noise of its
            own, which does not depend on how many rows there are; that of the first is the single observation's.

        Raises:
            UserError: for another shape or type, for NaN or infinity, or if the number of observations changes in the
                midst of a plan.
        """
        observations, is_single = self._rows(observation)
        plans = self._plans_for(len(observations))
        waiting = [row for row, plan in enumerate(plans) if not plan]
        if waiting:
            generators = self._generators(len(observations))
            noise = np.stack([self.draw_noise(generators[row]) for row in waiting])
            for row, actions in zip(waiting, self.plan(observations[waiting], noise), strict=True):
                plans[row].extend(actions)
        taken = np.stack([plan.popleft() for plan in plans])
        return taken[0] if is_single else taken

    def single(self, observation: Any) -> np.ndarray:
        """One observation as an array, checked as `act` does.

        Raises:
            UserError: for another shape or type, for NaN or infinity.
        """
        found = self._array(observation)
        if found.shape != self.spec.observation_shape:
            raise UserError(f"an observation has shape {self.spec.observation_shape}, got {found.shape}")
        self._check_numbers(found)
        return found

    def draw_noise(self, rng: np.random.Generator) -> np.ndarray:
        """The noise of one decision in one state, shape `noise_shape`."""
        return rng.standard_normal(self.noise_shape, dtype=np.float32)

    def _as_taken(self, observations: np.ndarray) -> np.ndarray:
        """Observations of the type and in the order of memory that networks take."""
        return np.require(observations, np.float32 if self.spec.image is None else np.uint8, ["C", "W"])

    def _begin_noise(self, seed: int) -> None:
        self._seed = checked_seed(seed)
        self._noise: list[np.random.Generator] = []  # of each row

    def _plans_for(self, rows: int) -> list[deque[np.ndarray]]:
        """What is left of the plan of each of so many rows."""
        if len(self._plans) != rows:
            if any(self._plans):
                raise UserError(
                    f"a plan for {len(self._plans)} observations is not at its end, got {rows}: call reset()"
                )
            self._plans = [deque() for _ in range(rows)]
        return self._plans

    def _mask(self, rows: Any) -> np.ndarray:
        """The `rows` of `reset`, checked."""
        mask = np.asarray(rows)
        if mask.dtype != bool or mask.shape != (len(self._plans),):
            raise UserError(
                f"rows= says of each of the {len(self._plans)} observations that act() was last given whether an "
                f"episode begins, as terminated | truncated do; got {mask.dtype} of shape {mask.shape}"
            )
        return mask

    def _rows(self, observation: Any) -> tuple[np.ndarray, bool]:
        """The observations, checked, and whether there is but one."""
        shape, found = self.spec.observation_shape, self._array(observation)
        is_single = found.shape == shape
        if not is_single and (found.shape[1:] != shape or len(found) == 0):
            several = ("batch", *shape)
            raise UserError(f"an observation has shape {shape}, or several {several}, got {found.shape}")
        self._check_numbers(found)
        return (found[None] if is_single else found), is_single

    def _array(self, observation: Any) -> np.ndarray:
        try:
            return np.asarray(observation)
        except (ValueError, TypeError, RuntimeError) as error:  # such as rows of several lengths, or a GPU's tensor
            raise UserError(f"an observation is an array of shape {self.spec.observation_shape}: {error}") from error

    def _check_numbers(self, observations: np.ndarray) -> None:
        if self.spec.image is not None:
            if observations.dtype != np.uint8:
                raise UserError(f"an observation is an image of uint8, got {observations.dtype}")
        elif observations.dtype.kind not in "biuf":
            raise UserError(f"an observation holds numbers, got {observations.dtype}")
        else:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinity
                if not np.isfinite(observations.astype(np.float32)).all():
                    raise UserError("the observation holds NaN or infinity")

    def _generators(self, rows: int) -> list[np.random.Generator]:
        for row in range(len(self._noise), rows):
            self._noise.append(noise_stream(self._seed, row))
        return self._noise[:rows]


class Policy(AnyPolicy):
    """Acts with an agent's networks, always in evaluation mode and without gradients, see `AnyPolicy`.

    Args:
        agent: whose policy it is, as it is at each call; it may go on training in between.
        explore: take the actions from which to learn in the environment instead of the best ones.
        seed: of the noise that `act` draws.
        units: of the environment, see `Units`.
    """

    def __init__(self, agent: Agent, explore: bool = False, seed: int = 0, units: Units = AS_THEY_ARE) -> None:
        super().__init__(seed, units)
        self.agent, self._explore = agent, explore

    @property
    def spec(self) -> Spec:
        return self.agent.spec

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.agent.act_noise_shape

    def plan(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        device = self.agent.device
        seen = torch.from_numpy(self._as_taken(self.units.observed(observations))).to(device)
        actions = self.actions(seen, torch.from_numpy(noise).to(device))
        return self.units.executed(actions.float().cpu().numpy().reshape(len(observations), self.spec.horizon, -1))

    @torch.no_grad()
    def foresee(self, observations: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if not self.agent.traits.reads_path:
            return None
        device = self.agent.device
        seen = torch.from_numpy(self._as_taken(self.units.observed(observations))).to(device)
        foresight = self.agent.foresee(seen, torch.from_numpy(noise).to(device))
        return None if foresight is None else (foresight.states.cpu().numpy(), foresight.scale.cpu().numpy())

    @torch.no_grad()
    def actions(self, observations: Tensor, z: Tensor) -> Tensor:
        """What the agent decides, on its device, shape (batch, action_dim of the whole chunk).

        Args:
            observations: shape (batch, *observation_shape).
            z: standard normal noise, shape (batch, *act_noise_shape).
        """
        decide = self.agent.explore if self._explore else self.agent.act
        with evaluation_mode(self.agent):
            return decide(observations, z)

    def deciding(self) -> AbstractContextManager[None]:
        return evaluation_mode(self.agent)


def checked_seed(seed: Any) -> int:
    """The seed of a policy's noise; raises `UserError` unless it is a whole number of at least 0."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed must be a whole number of at least 0, got {seed}")
    return int(seed)


def noise_stream(seed: int, row: int = 0) -> np.random.Generator:
    """From which `Policy.act` draws the noise of a row (that of a single observation is 0), decision after decision."""
    return np.random.default_rng(fold_seed(seed, "act", row))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each part's own mode again afterwards; free where it is in that mode already."""
    training = [part for part in module.modules() if part.training] if module.training else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
