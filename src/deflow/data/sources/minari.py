"""Minari's data sets, local or downloaded with its own client."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from deflow.data.sources.columns import Arrays
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.ranges import Seed
from deflow.trust import check_environment_spec
from deflow.types import Spec

# Parts of a dictionary observation in the order of D4RL's vector; the desired goal is fixed and left out.
GOAL_ENV_KEYS = ("achieved_goal", "observation")


@dataclass
class MinariSource(Source):
    """A Minari data set.

    Its D4RL family was collected anew in other simulators: a score here is Minari's, never D4RL's.

    Args:
        dataset_id: such as `D4RL/antmaze/umaze-v1` or `D4RL/pen/human-v2`.
        download: whether to download a data set that is not on disk.
        reward_shift: added to every reward; -1 makes each step of a sparse task cost 1, as in the papers' antmaze.
        seed: of the validation split, a tenth of the trajectories.
    """

    dataset_id: str
    download: bool
    reward_shift: float = 0.0
    seed: Seed = 0
    _dataset: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.dataset_id

    @property
    def task(self) -> str:
        return self.dataset_id

    def prepare(self) -> None:
        self._load()

    def _load(self) -> Any:
        if self._dataset is None:
            if importlib.util.find_spec("minari") is None:
                raise UserError("data=minari needs the package minari: pip install 'deflow[d4rl]'")
            import minari

            try:
                if self.download and not _folder(self.dataset_id).exists():
                    minari.download_dataset(self.dataset_id)
                _check_environments(self.dataset_id)  # to load may already be to make one
                self._dataset = minari.load_dataset(self.dataset_id)
            except UserError:
                raise
            except Exception as error:  # its client raises whatever its storage and its HTTP library do
                raise UserError(f"cannot load Minari's data set {self.dataset_id}: {error}") from error
        return self._dataset

    def arrays(self) -> tuple[Arrays, None]:
        columns: dict[str, list[np.ndarray]] = {}
        for episode in self._load().iterate_episodes():
            length = len(episode.actions)
            rows = {
                "observations": _flatten(episode.observations),
                "actions": _with_last_again(episode.actions.reshape(length, -1)),
                "rewards": _padded(episode.rewards + self.reward_shift),
                "masks": _padded(1.0 - episode.terminations),
                "valids": _padded(np.ones(length, np.float32)),
            }
            for key, column in rows.items():
                columns.setdefault(key, []).append(column)
        return {key: np.concatenate(parts) for key, parts in columns.items()}, None

    def spec(self) -> Spec:
        episode = self._load()[0]
        return Spec(_flatten(episode.observations).shape[1], int(np.prod(episode.actions.shape[1:])))

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        if importlib.util.find_spec("gymnasium_robotics") is not None:
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
        try:
            env = self._load().recover_environment(eval_env=True, **kwargs)
        except Exception as error:  # the environment's package may be missing, or its version gone
            raise UserError(f"cannot make the environment of {self.dataset_id}: {error}") from error
        return _FlatObservation(env) if isinstance(env.observation_space, gymnasium.spaces.Dict) else env

    def protocol(self) -> dict[str, Any]:
        return {"protocol": "Minari data and environment; its score is not D4RL's", "score": "Minari's normalised"}

    def score(self, episode_return: float) -> float | None:
        metadata = self._load().storage.metadata
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        if low is None or high is None:
            return None
        return 100.0 * (episode_return - low) / (high - low)

    def provenance(self) -> dict[str, Any]:
        storage = self._load().storage
        return {"name": self.name, "path": str(storage.data_path), "generated": False}


def _folder(dataset_id: str) -> Path:
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path(dataset_id) / "data"


def _check_environments(dataset_id: str) -> None:
    """The environments that a data set names are code: of known packages, or trusted ones."""
    file = _folder(dataset_id) / "metadata.json"
    metadata = json.loads(file.read_text()) if file.exists() else {}
    for key in ("env_spec", "eval_env_spec"):
        if metadata.get(key) is not None:
            check_environment_spec(metadata[key], f"{file}: {key}")


class _FlatObservation(gymnasium.ObservationWrapper):
    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, gymnasium.spaces.Dict)
        size = sum(int(np.prod(env.observation_space[key].shape or ())) for key in GOAL_ENV_KEYS)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(observation[key]) for key in GOAL_ENV_KEYS])


def _flatten(observations: Any) -> np.ndarray:
    """One row a state from an array, or from a dictionary of arrays as goal environments have them."""
    if isinstance(observations, dict):
        missing = [key for key in GOAL_ENV_KEYS if key not in observations]
        if missing:
            raise UserError(f"a dictionary observation needs {', '.join(GOAL_ENV_KEYS)}; it lacks {', '.join(missing)}")
        return np.concatenate([np.asarray(observations[key]) for key in GOAL_ENV_KEYS], axis=1)
    array = np.asarray(observations)
    return array.reshape(len(array), -1)


def _with_last_again(actions: np.ndarray) -> np.ndarray:
    """A row more, for the episode's last state, in which nothing was done."""
    return np.concatenate([actions, actions[-1:]])


def _padded(column: np.ndarray) -> np.ndarray:
    """A row of zeros more, for the episode's last state."""
    return np.concatenate([column, np.zeros_like(column[:1])])
