"""What the sources of a user's own files share: where they lie, and the environment to evaluate in, if any."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import gymnasium

from deflow.data.sources.source import Source
from deflow.envs.success import SuccessRule
from deflow.errors import UserError
from deflow.ranges import Count, Seed


@dataclass
class OwnDataSource(Source):
    """Transitions from files of the user's.

    Args:
        path: of the file or folder.
        env: gymnasium id of the environment for evaluation; null trains without evaluation.
        max_episode_steps: after which an episode is cut; null leaves that to the environment.
        success_key: what of `info` says whether an episode succeeded; null: `success` or `is_success`.
        success_ever: whether success at any step counts, and not only at the last.
        seed: of the validation split, a tenth of the trajectories, where the data have none of their own.
    """

    path: str
    _: KW_ONLY
    env: str | None = None
    max_episode_steps: Count | None = None
    success_key: str | None = None
    success_ever: bool = False
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

    def protocol(self) -> dict[str, Any]:
        return {"protocol": "the user's own data" + (f", evaluated in {self.env}" if self.env else "")}

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self._path),
            "bytes": sum(path.stat().st_size for path in self._files),
            "generated": False,
        }
