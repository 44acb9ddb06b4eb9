"""OGBench data sets: found on disk, downloaded, or generated with OGBench's own recipes."""

from __future__ import annotations

import logging
import zipfile
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np

from deflow.data.generate.runner import generate_dataset, generated_path, read_card
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.columns import Arrays
from deflow.data.sources.download import download, identities, set_aside
from deflow.data.sources.shards import map_shards
from deflow.data.sources.source import Source
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.files import check_folder, locked
from deflow.ranges import Count, ReadIf, Seed, TaskId
from deflow.types import Spec

log = logging.getLogger(__name__)

KEYS = ("observations", "actions", "terminals", "qpos", "qvel")
MOSTLY_INSIDE = 0.95  # share of positions in a maze's free cells, below which the data are of another maze

IF_GENERATED = ReadIf("generate_if_missing", True)


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
        generate_workers: processes that generate; None is one for each core that this process may use.
        frames: last images that make an observation; not read for states.
    """

    env: str
    dataset: str
    task_id: TaskId | None
    dir: str
    path: str | None
    url: str
    download: bool
    generate_if_missing: bool
    generate_episodes: Annotated[Count, IF_GENERATED]
    generate_seed: Annotated[Seed, IF_GENERATED]
    generate_workers: Annotated[Count | None, IF_GENERATED]
    frames: Count = 1
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
        self._found()

    def _found(self) -> Path:
        path = self._find()
        if path is not None:
            return path
        if self.path is not None:
            self._refuse_half(Path(self.path).expanduser())
            raise UserError(f"data.source.path: no file or folder of files {self.path} (each with its -val.npz)")
        check_folder(self._downloaded.parent, "paths.data")
        with self._locked():
            if self._find() is None:
                self._fetch()
        path = self._find()
        assert path is not None
        return path

    def arrays(self) -> tuple[Arrays, Arrays]:
        return self._arrays_of(_shards(self._found())[0])

    def load(self) -> tuple[Transitions, Transitions | None]:
        """Both splits; of a folder of files the validation split is the first file's."""
        path = self._found()
        if path.is_file():
            return super().load()
        _, validation = super().load()

        def load(shard: Path) -> Transitions:
            return self.transitions(self._arrays_of(shard)[0], str(shard))

        train = map_shards(_shards(path), load, path / "unpacked" / self.task, {"task": self.task}, labels=True)
        return replace(train, frames=self.frames), validation

    def _arrays_of(self, path: Path) -> tuple[Arrays, Arrays]:
        """Both splits; files that this source can have again, and that are of no use, are had again, once."""
        env, self._spare_env = self._spare_env or ogbench.make_env(self.task), None
        try:
            seen = identities(_files(path))
            try:
                return self._read(path, env)
            except UserError as error:
                if not self._can_be_had_again(path):
                    raise
                with self._locked():
                    if identities(_files(path)) == seen:  # else another process has been here
                        for file in _damaged(path, env):
                            set_aside(file, error)
                        self._fetch()
            return self._read(self._found(), env)
        finally:
            env.close()

    def _read(self, path: Path, env: gymnasium.Env) -> tuple[Arrays, Arrays]:
        for file in _files(path):
            _check_file(file, env)
        try:
            arrays = ogbench.load_arrays(self.task, str(path), env)
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError, IndexError) as error:
            raise UserError(f"cannot read {path}: {error}; make or download it again") from error
        inside = ogbench.share_in_free_cells(env, arrays[0]["observations"])
        if inside is not None and inside < MOSTLY_INSIDE:
            raise UserError(f"{path} is of another maze than {self.task}: {1 - inside:.0%} of its positions are walls")
        return arrays

    def _can_be_had_again(self, path: Path) -> bool:
        if self.path is not None:
            return False
        return self.download if path == self._downloaded else path == self._generated and self.generate_if_missing

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self._downloaded.with_suffix(".lock"), f"the data set {self.name}")

    def tasks(self) -> dict[str, Source]:
        numbered = (replace(self, task_id=number) for number in ogbench.TASK_IDS)
        return {source.task: source for source in numbered}

    def spec(self) -> Spec:
        return self._of_env[0]

    def make_env(self, **kwargs: Any) -> gymnasium.Env:
        return ogbench.stack_frames(ogbench.make_env(self.task, **kwargs), self.frames)

    def meet_environment(self, spec: Spec) -> None:
        """Its sizes are the environment's own, and files of other sizes are refused."""

    def protocol(self) -> dict[str, Any]:
        return {"protocol": "OGBench single-task", "success_timing": self._of_env[1]}

    @cached_property
    def _of_env(self) -> tuple[Spec, str]:
        """Sizes and success timing, for which an environment has to be made: manipulation's take a second each."""
        self._spare_env = ogbench.make_env(self.task)
        spec = ogbench.spec_of(ogbench.stack_frames(self._spare_env, self.frames))
        return spec, getattr(self._spare_env.unwrapped, "_success_timing", "unknown")

    def provenance(self) -> dict[str, Any]:
        path = self._found()
        size = sum(file.stat().st_size for file in _shards(path))
        made = read_card(path)
        generated = bool(made) or path == self._generated
        return {"name": self.name, "path": str(path), "bytes": size, "generated": generated, **made}

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
            self._refuse_half(self._downloaded)
            raise UserError(
                f"no {self.name}.npz in {self._downloaded.parent}: set paths.data, data.source.download=true or "
                "data.source.generate_if_missing=true"
            )
        log.warning("generating %s: NOT the published data set, do not compare with published numbers", self.name)
        generate_dataset(
            self.name,
            self.generate_episodes,
            self._generated.parent,
            self.generate_seed,
            self.generate_workers,
            overwrite=True,  # what lies there is half of a set, or of no use
        )

    @staticmethod
    def _refuse_half(path: Path) -> None:
        """Raise `UserError` if a training file is there and only its validation file is missing."""
        for train, validation in map(_files, _shards(path)):
            if train.is_file() and not validation.is_file():
                raise UserError(f"{train} is there, but its validation file {validation.name} is not beside it")

    @property
    def _downloaded(self) -> Path:
        return Path(self.dir).expanduser() / f"{self.name}.npz"

    @property
    def _generated(self) -> Path:
        return generated_path(Path(self.dir).expanduser(), self.name, self.generate_episodes, self.generate_seed)

    @property
    def _candidates(self) -> list[Path]:
        """Where the data may lie, the best place first."""
        candidates = [Path(self.path).expanduser()] if self.path is not None else [self._downloaded, self._generated]
        if self.path is None and not self.download and self.generate_if_missing:
            candidates.reverse()  # data asked to be generated comes before whatever else lies there
        return candidates

    def _find(self) -> Path | None:
        return next((path for path in self._candidates if _is_complete(path)), None)


def _files(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(path.stem + "-val.npz")


def _damaged(path: Path, env: gymnasium.Env) -> list[Path]:
    """Which of a set's two files fails its check or cannot be read to its end; both, if neither is known to."""
    return [file for file in _files(path) if not _is_sound(file, env)] or list(_files(path))


def _is_sound(path: Path, env: gymnasium.Env) -> bool:
    try:
        _check_file(path, env)
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (UserError, zipfile.BadZipFile, zlib.error, OSError, EOFError):
        return False


def _shards(path: Path) -> list[Path]:
    """The training files of a folder, or the file itself."""
    return [path] if path.is_file() else sorted(p for p in path.glob("*.npz") if not p.stem.endswith("-val"))


def _shape(path: Path, key: str) -> tuple[int, ...]:
    """The shape of a column, without reading it: images may take most of the memory."""
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
