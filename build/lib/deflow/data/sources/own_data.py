"""What the sources of a user's own files share: where they lie, and the environment to evaluate in, if any."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
from gymnasium.spaces import Box

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.source import BEYOND, Source, unless_one
from deflow.envs.success import SuccessRule
from deflow.errors import UserError
from deflow.ranges import Count, Interval, Seed
from deflow.units import Numbers, Units


@dataclass
class OwnDataSource(Source):
    """Transitions from files of the user's.

    Args:
        path: of the file or folder.
        env: gymnasium id of the environment for evaluation; null trains without evaluation.
        max_episode_steps: after which an episode is cut; null leaves that to the environment.
        success_key: what of `info` says whether an episode succeeded; null: `success` or `is_success`.
        success_ever: whether success at any step counts, and not only at the last.
        action_range: [lowest, highest] action, which the policy decides as -1 and 1; null takes actions as they are, in
            [-1, 1]; `auto`: the bounds of the environment's actions, or without one the data's if they go beyond 1.
        standardise: whether networks see observations less the data's mean, over its standard deviation.
        seed: of the validation split, a tenth of the trajectories, where the data have none of their own.
    """

    path: str
    _: KW_ONLY
    env: str | None = None
    max_episode_steps: Count | None = None
    success_key: str | None = None
    success_ever: bool = False
    action_range: Literal["auto"] | Interval | None = "auto"
    standardise: bool = False
    seed: Seed = 0

    @property
    def name(self) -> str:
        return self._path.name if self._path.is_dir() else self._path.stem

    @property
    def task(self) -> str:
        return self.env or self.name

    @property
    def _path(self) -> Path:
        return Path(self.path).expanduser()

    @property
    @abstractmethod
    def _files(self) -> list[Path]:
        """All that is read, in order."""

    @property
    def success(self) -> SuccessRule:  # type: ignore[override]
        return SuccessRule(self.success_key, self.success_ever)

    @property
    def has_env(self) -> bool:
        return self.env is not None

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        try:
            return gymnasium.make(self.env or "", max_episode_steps=self.max_episode_steps, **kwargs)
        except Exception as error:  # what is registered under a name may raise anything
            raise UserError(f"data.source.env: cannot make {self.env}: {error}") from error

    def with_units(self, whole: Transitions) -> Transitions:
        low, high = self._range(whole)
        return super().with_units(replace(whole, units=Units(low, high)))

    def _range(self, whole: Transitions) -> tuple[Numbers, Numbers] | tuple[None, None]:
        """What the policy decides as -1 and as 1, a number a dimension; None, if these are -1 and 1."""
        size = whole.actions.shape[1]
        if self.action_range is None:
            return None, None
        if self.action_range != "auto":
            if not self.action_range[0] < self.action_range[1]:
                raise UserError(f"data.source.action_range must be [lowest, highest], got {list(self.action_range)}")
            return (float(self.action_range[0]),) * size, (float(self.action_range[1]),) * size
        if self.has_env:
            env = self.make_env()
            space = env.action_space
            env.close()
            if isinstance(space, Box) and space.is_bounded():
                return unless_one(space.low.reshape(-1), space.high.reshape(-1))
        taken = whole.actions[whole.starts]
        if taken.abs().max() <= 1 + BEYOND:
            return None, None
        return unless_one(taken.amin(0).numpy(), taken.amax(0).numpy())

    def protocol(self) -> dict[str, Any]:
        return {"protocol": "the user's own data" + (f", evaluated in {self.env}" if self.env else "")}

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self._path),
            "bytes": sum(path.stat().st_size for path in self._files),
            "generated": False,
        }
