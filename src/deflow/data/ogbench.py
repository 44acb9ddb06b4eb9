"""OGBench data sets: found on disk, downloaded, or generated with OGBench's own recipes."""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from filelock import FileLock

from deflow.data.download import download
from deflow.data.generate.runner import generate_dataset
from deflow.data.source import Arrays, Source
from deflow.data.transitions import Transitions
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.types import Spec

log = logging.getLogger(__name__)

KEYS = ("observations", "actions", "terminals", "qpos", "qvel")


@dataclass
class OGBenchSource(Source):
    """A single-task OGBench data set.

    The file is looked for at `path` or in `dir`; if it is missing it is downloaded, and if that is off or fails,
    generated. Generated data lives in a folder of its own, so that it never passes for the published set.

    Args:
        env: environment, such as `cube-single`.
        dataset: data-set type, such as `play`.
        task_id: 1 to 5, or None for OGBench's default task.
        dir: folder of the downloaded `.npz` files.
        path: one `.npz` file (its `-val.npz` beside it) to use instead, or a folder of such files, as OGBench's largest
            sets come: those are unpacked there once and mapped into memory.
        url: where the files are downloaded from.
        download: whether to download a missing file.
        generate_if_missing: whether to generate a file that is neither there nor downloaded.
        generate_episodes: episodes to generate for training; a tenth of it for validation.
        generate_seed: seed of the generated data.
        generate_workers: processes that generate.
        frames: last images that make an observation; not read for states.
    """

    env: str
    dataset: str
    task_id: int | None
    dir: str
    path: str | None
    url: str
    download: bool
    generate_if_missing: bool
    generate_episodes: int
    generate_seed: int
    generate_workers: int
    frames: int = 1
    # An environment as the data were made, one frame at a time, that was asked for sizes and can serve once more.
    _spare_env: gymnasium.Env | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """OGBench's name of the data set."""
        return ogbench.dataset_name(self.env, self.dataset)

    @property
    def task(self) -> str:
        """OGBench's name of the single task."""
        return ogbench.task_name(self.env, self.dataset, self.task_id)

    def prepare(self) -> None:
        """See to it that the files are on disk; the processes of a machine take turns, so one does the work."""
        if self._find() is not None:
            return
        if self.path is not None:
            raise UserError(f"data.source.path: no file or folder of files {self.path} (each with its -val.npz)")
        self._downloaded.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._downloaded.with_suffix(".lock")):
            if self._find() is None:
                self._fetch()

    def arrays(self) -> tuple[Arrays, Arrays]:
        path = self._find()
        assert path is not None, "prepare() first"
        return self._arrays_of(_shards(path)[0])

    def load(self) -> tuple[Transitions, Transitions]:
        path = self._find()
        assert path is not None, "prepare() first"
        if path.is_file():
            return super().load()
        return self.load_shards(_shards(path), self._arrays_of, path / "unpacked" / self.task)

    def _arrays_of(self, path: Path) -> tuple[Arrays, Arrays]:
        env, self._spare_env = self._spare_env or ogbench.make_env(self.task), None
        try:
            for file in _files(path):
                _check_file(file, env)
            try:
                return ogbench.load_arrays(self.task, str(path), env)
            except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError, IndexError) as error:
                raise UserError(f"cannot read {path}: {error}; make or download it again") from error
        finally:
            env.close()

    def tasks(self) -> dict[str, Source]:
        numbered = (replace(self, task_id=number) for number in ogbench.TASK_IDS)
        return {source.task: source for source in numbered}

    def spec(self) -> Spec:
        return self._of_env[0]

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        return ogbench.stack_frames(ogbench.make_env(self.task, **kwargs), self.frames)

    def protocol(self) -> dict[str, Any]:
        return {"protocol": "OGBench single-task, no action chunking", "success_timing": self._of_env[1]}

    @cached_property
    def _of_env(self) -> tuple[Spec, str]:
        """Sizes and success timing, for which an environment has to be made: manipulation's take a second each."""
        self._spare_env = ogbench.make_env(self.task)
        spec = ogbench.spec_of(ogbench.stack_frames(self._spare_env, self.frames))
        return spec, getattr(self._spare_env.unwrapped, "_success_timing", "unknown")

    def provenance(self) -> dict[str, Any]:
        path = self._find()
        assert path is not None
        card = path.with_suffix(".json")
        made: dict[str, Any] = json.loads(card.read_text()) if card.exists() else {}
        size = sum(file.stat().st_size for file in _shards(path))
        return {"name": self.name, "path": str(path), "bytes": size, "generated": bool(made), **made}

    def _fetch(self) -> None:
        if self.download:
            try:
                for file in _files(self._downloaded):
                    if not file.exists():
                        download(f"{self.url.rstrip('/')}/{file.name}", file)
                return
            except UserError as error:
                if not self.generate_if_missing:
                    raise UserError(
                        f"{error}. Put {self.name}.npz and {self.name}-val.npz into {self._downloaded.parent}, "
                        "or set data.source.generate_if_missing=true"
                    ) from error
                log.warning("%s", error)
        if not self.generate_if_missing:
            raise UserError(
                f"no {self.name}.npz in {self._downloaded.parent}: set paths.data, data.source.download=true or "
                "data.source.generate_if_missing=true"
            )
        log.warning("generating %s: NOT the published data set, do not compare with published numbers", self.name)
        generate_dataset(
            self.name, self.generate_episodes, self._generated.parent, self.generate_seed, self.generate_workers
        )

    @property
    def _downloaded(self) -> Path:
        return Path(self.dir).expanduser() / f"{self.name}.npz"

    @property
    def _generated(self) -> Path:
        folder = f"{self.name}-{self.generate_episodes}ep-seed{self.generate_seed}"
        return Path(self.dir).expanduser() / "generated" / folder / f"{self.name}.npz"

    def _find(self) -> Path | None:
        candidates = [Path(self.path).expanduser()] if self.path is not None else [self._downloaded, self._generated]
        if self.path is None and not self.download and self.generate_if_missing:
            candidates.reverse()  # data asked to be generated comes before whatever else lies there
        return next((path for path in candidates if _is_complete(path)), None)


def _files(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(path.stem + "-val.npz")


def _shards(path: Path) -> list[Path]:
    """The training files of a folder, or the file itself."""
    return [path] if path.is_file() else sorted(p for p in path.glob("*.npz") if not p.stem.endswith("-val"))


def _shape(path: Path, key: str) -> tuple[int, ...]:
    """Of a column, without reading it: images may take most of the memory."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, _ = np.lib.format.read_array_header_1_0(member)
    return shape


def _is_complete(path: Path) -> bool:
    shards = _shards(path) if path.exists() else []
    return bool(shards) and all(file.is_file() for shard in shards for file in _files(shard))


def _check_file(path: Path, env: Any) -> None:
    """Raise `UserError` unless `path` looks like OGBench's data of the environment `env`."""
    try:
        with np.load(path) as file:
            keys = set(file.files)
            missing = [key for key in KEYS if key not in keys]
            if missing:
                raise UserError(f"{path} is not an OGBench data set: it lacks {', '.join(missing)}")
        shapes = tuple(_shape(path, key)[1:] for key in ("actions", "observations", "qpos"))
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UserError(
            f"cannot read {path}: it is truncated or not an .npz file; make or download it again"
        ) from error
    data = getattr(env.unwrapped, "data", None)  # mazes; manipulation environments keep it private
    data = env.unwrapped._data if data is None else data
    expected = env.action_space.shape, env.observation_space.shape, (len(data.qpos),)
    if shapes != expected:
        raise UserError(
            f"{path} is of another environment than {env.spec.id}: (action, observation, qpos) sizes "
            f"{[int(np.prod(s)) for s in shapes]}, expected {[int(np.prod(s)) for s in expected]}"
        )
