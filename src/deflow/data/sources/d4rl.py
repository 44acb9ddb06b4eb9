"""D4RL's original HDF5 files, read without D4RL, and D4RL's environments on today's simulator."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from deflow.data.memory.transitions import Transitions
from deflow.data.sources.columns import Arrays
from deflow.data.sources.custom import read_columns
from deflow.data.sources.download import download, identities, set_aside
from deflow.data.sources.source import Reward, Source, compact, split
from deflow.envs.ogbench import load_mujoco
from deflow.errors import UserError
from deflow.extras import require
from deflow.files import check_folder, locked
from deflow.ranges import Seed
from deflow.types import Spec

KEYS = {key: key for key in ("observations", "actions", "rewards", "terminals", "timeouts")}

# Returns of a random and of an expert policy: scores are 0 at the one and 100 at the other (arXiv 2004.07219).
REFERENCE_RETURNS = {
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
}

# Sizes of (observations, actions), by which a file of another environment is noticed.
SIZES = {"antmaze": (29, 8), "pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}

# Steps after which an episode is cut, of each maze and robot.
STEPS = {"umaze": 700, "medium": 1000, "large": 1000, "pen": 100, "door": 200, "hammer": 200, "relocate": 200}


@dataclass
class D4RLSource(Source):
    """A D4RL data set of the antmaze or adroit family, from its original `.hdf5` file.

    As in the papers, antmaze rewards are reduced by 1, so that every step costs 1 until the goal (what another paper
    makes of the file's as a * r + b is data.reward_scale=a, data.reward_shift=a+b here), a terminal there does not end
    the trajectory, and all trajectories are trained on: the validation split is a tenth of the same ones.
    Policies are evaluated in D4RL's environments, rebuilt on today's simulator: every result says so.

    Args:
        dataset: D4RL's name, such as `antmaze-medium-play-v2` or `pen-human-v1`.
        path: of the `.hdf5` file; null looks for (or downloads) it in `dir`.
        dir: folder of downloaded files.
        url: where the file is downloaded from; null does not download.
        standardise: whether networks see observations less the data's mean, over its standard deviation, as those of
            CORL's IQL, TD3+BC and CQL do (there 0.001 is added to the deviation).
        seed: of the choice of the validation split.
    """

    dataset: str
    path: str | None
    dir: str
    url: str | None
    standardise: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self._family not in SIZES:
            raise UserError(f"unknown D4RL data set '{self.dataset}': the families are {', '.join(SIZES)}")
        self._is_maze = self._family == "antmaze"
        if self._place not in STEPS:
            raise UserError(f"unknown D4RL data set '{self.dataset}': the mazes are umaze, medium and large")
        self._step_cost = 1.0 if self._is_maze else 0.0

    @property
    def name(self) -> str:
        return self.dataset

    @property
    def task(self) -> str:
        return self.dataset

    @property
    def _family(self) -> str:
        return self.dataset.partition("-")[0]

    @property
    def _place(self) -> str:
        """The maze or the robot."""
        return [*self.dataset.split("-"), ""][1] if self._is_maze else self._family

    @property
    def _path(self) -> Path:
        return Path(self.path or Path(self.dir) / f"{self.dataset}.hdf5").expanduser()

    def prepare(self) -> None:
        if self._path.is_file():
            return
        if self.path is not None or self.url is None:
            raise UserError(f"no file {self._path}: set data.source.path to {self.dataset}'s .hdf5 file")
        with self._locked():
            if not self._path.is_file():
                self._fetch()

    def _fetch(self) -> None:
        import h5py

        assert self.url is not None
        check_folder(self._path.parent, "data.source.dir")
        download(self.url, self._path, h5py.is_hdf5)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self._path.with_suffix(".lock"), f"the data set {self.dataset}")

    def arrays(self) -> tuple[Arrays, None]:
        """The whole set; a downloaded file that is of no use is fetched again, once."""
        seen = identities([self._path])
        try:
            return self._read()
        except UserError as error:
            if self.path is not None or self.url is None:
                raise
            with self._locked():
                if identities([self._path]) == seen:  # else another process has been here
                    set_aside(self._path, error)
                    self._fetch()
        return self._read()

    def _read(self) -> tuple[Arrays, None]:
        columns, _ = read_columns(self._path, KEYS)
        sizes = columns["observations"].shape[1], columns["actions"].shape[1]
        if sizes != SIZES[self._family]:
            raise UserError(
                f"{self._path} is of another environment than {self.dataset}: (observation, action) sizes {sizes}, "
                f"expected {SIZES[self._family]}"
            )
        terminals, timeouts = columns["terminals"], columns["timeouts"]
        arrays = compact(
            columns["observations"],
            columns["actions"],
            columns["rewards"],
            1.0 - terminals.astype(np.float32),
            timeouts if self._is_maze else terminals | timeouts,
        )
        return arrays, None

    def load(self) -> tuple[Transitions, Transitions | None]:
        """All is trained on, as in the papers; a tenth of the same trajectories validates."""
        whole = self.with_units(self.transitions(self.arrays()[0], self.name))
        return whole, split(whole, self.seed, self.name)[1]

    def spec(self) -> Spec:
        return Spec(*SIZES[self._family])

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        load_mujoco()
        steps = STEPS[self._place]
        if self._is_maze:
            maze = "deflow.envs.d4rl_antmaze:AntMaze"
            spec = EnvSpec("AntMaze-v2", maze, max_episode_steps=steps, kwargs={"maze": self._place})
            return gymnasium.make(spec, **kwargs)
        require("D4RL's adroit", "gymnasium_robotics")
        from deflow.envs.d4rl_adroit import Adroit

        return Adroit(self._place, steps, **kwargs)

    def label(self, reward: Reward) -> Reward:
        return reward - self._step_cost

    def protocol(self) -> dict[str, Any]:
        return {
            "protocol": f"D4RL data, and environment rebuilt on MuJoCo {version('mujoco')} (D4RL's was 2: contacts and "
            "random draws differ); trained on all data, validated on a tenth of the same",
            "score": "100 at D4RL's expert return, 0 at its random one",
        }

    def score(self, episode_return: float) -> float:
        low, high = REFERENCE_RETURNS[self._family]
        return 100.0 * (episode_return - low) / (high - low)

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name, "path": str(self._path), "bytes": self._path.stat().st_size, "generated": False}
