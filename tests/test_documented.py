"""Every command of the README and the pages is composed, and run on next to nothing unless a reason is given."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from omegaconf import DictConfig

from deflow.benchmark import benchmark
from deflow.data.generate.runner import generate_dataset
from deflow.distillation import distill
from deflow.envs import ogbench
from deflow.evaluating import evaluate
from deflow.evaluation import latency
from deflow.exporting import export
from deflow.inspection import inspect
from deflow.pipeline import train
from deflow.reproduction.layout import layout
from deflow.reproduction.plan import plan
from deflow.reproduction.reproduce import reproduce
from deflow.reproduction.results import result_of, write_results
from deflow.run_folder import SUMMARY_FILE
from deflow.settings import check_settings
from deflow.sharing.push import push
from tests.commands import ROOT, TINY
from tests.conftest import CKPT, compose_config, shorten_episodes, tiny_config, write_d4rl
from tests.data.sources import test_lerobot, test_robomimic
from tests.reproduction.runs import write_run
from tests.test_benchmark import TINY as TINY_BENCHMARK

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
STARTS = re.compile(r"^ {4,}((?:python|make|deflow|torchrun|srun|pip|docker)\b.*?)(?: +#.*)?$", re.MULTILINE)
RUNS = r"(logs/scene/2026-01-31_12-00-00|RUN)/checkpoints/[^/]*"  # and one of its stages
FOR_HYDRA = ("--help", "-m", "hydra/", "hydra.")

# Why a command is composed and not run -> what tells such commands.
NOT_RUN = {
    "it installs, or runs for minutes": r"make ",
    "it shows the help: tests/test_help.py": r".* --help",
    "it goes on with a run: test_a_run_is_resumed": r".* resume=",
    "it needs a GPU": r".* trainer=gpu",
    "it needs several processes: tests/test_ddp.py": r".* trainer=ddp",
    "it needs a cluster": r"torchrun |srun ",
    "it needs Docker": r"docker ",
    "its data are downloaded": r".* experiment=minari|.*source\.url=",
    "it needs a hub or a registry: tests/test_sharing.py": r"(?!.* dry=true).*(hf://|models:/)",
    "it serves until it is stopped: tests/test_serving.py": r"python serve.py",
    "it needs a tracker: tests/test_loggers.py": r".* logger=(wandb|tensorboard)",
    "it needs an environment of one's own: tests/test_units.py": r".* data\.source\.env=",
    "it needs off-screen rendering: tests/evaluation/test_video.py": r".* video\.episodes=",
    "it begins with a checkpoint of FQL, which another command makes": r".* agent=fql .*ckpt=",
    "it measures everything: tests/test_benchmark.py": r"python benchmark.py( rounds=9.*)?$|.*measure=\[.*startup",
    "it trains a walking ant: tests/data/test_generate.py": r"python train_expert.py",
    "it is a study, of hours or with packages of its own: tests/test_studies.py": r"python studies/",
}
# What a page writes for what its reader has -> what stands there here.
STANDS_FOR = {"$kind": "gaussian", "${kind%% *}": "gaussian", "=DELTA": "=0.001", "USER": "someone"}


@dataclass(frozen=True)
class Typed:
    """A command as a page has it, continued lines joined and the first of its alternatives chosen."""

    text: str

    @property
    def script(self) -> str:
        """Name of the script that it starts."""
        return shlex.split(self.text)[1].removesuffix(".py")

    @property
    def overrides(self) -> list[str]:
        """What is composed, of a sweep the first job."""
        words = shlex.split(self.text)[2:]
        if "-m" in words:
            words = [word.split(",")[0] for word in words]
        words = ["profile=true" if word == "--profile" else word for word in words]
        return [word for word in words if not word.startswith(FOR_HYDRA)]

    @property
    def reasons(self) -> list[str]:
        """Why it is not run, if it is not."""
        return [reason for reason, pattern in NOT_RUN.items() if re.match(pattern, self.text)]


def documented() -> Iterator[Typed]:
    """Every command of every page, once."""
    seen = set()
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for text in STARTS.findall(re.sub(r" *\\\n +", " ", prose)):
            one = re.sub(r" \[([^]]*)\]", r" \1", re.sub(r"\|\S+", "", text))
            for placeholder, value in STANDS_FOR.items():
                one = one.replace(placeholder, value)
            if one not in seen:
                seen.add(one)
                yield Typed(one)


COMMANDS = list(documented())
COMPOSED = [c for c in COMMANDS if c.text.startswith("python ") and not c.script.startswith("studies/")]


@pytest.mark.parametrize("command", COMPOSED, ids=lambda command: command.text)
def test_commands_compose(command: Typed) -> None:
    assert (ROOT / f"{command.script}.py").exists()
    check_settings(compose_config(*command.overrides, config_name=command.script), command.script)


def test_a_command_in_a_fenced_block_would_be_missed() -> None:
    assert [page.name for page in PAGES if re.search(r"```(bash|sh|shell|console)", page.read_text())] == []


def test_every_command_is_run_or_says_why_not() -> None:
    assert [command.text for command in COMMANDS if not command.reasons and command.script not in SMALL] == []
    assert {reason for command in COMMANDS for reason in command.reasons} == set(NOT_RUN)
    tests = {path for reason in NOT_RUN for path in re.findall(r"tests/\S+\.py", reason)}
    studies = {f"{command.script}.py" for command in COMMANDS if command.text.startswith("python studies/")}
    assert {path for path in tests | studies if not (ROOT / path).exists()} == set()


# Running them.


def _train(config: DictConfig, out: Path) -> None:
    for stage in config.stages.values():
        if stage.get("steps", None) is not None:
            stage.steps = 2
    train(config, out)


def _reproduce(config: DictConfig, out: Path) -> None:
    if config.table is not None:  # of a whole table its first cell
        config.rows = config.rows or list(layout(config.table).rows)[:1]
        config.agents = config.agents or list(layout(config.table).columns)[:1]
    reproduce(config)


def _generate(config: DictConfig, out: Path) -> None:
    generate_dataset(config.dataset, config.episodes, out, config.seed, config.workers, config.steps, config.overwrite)


ONCE = ("updates=2", "online_updates=2", "eval.every=2", "eval.episodes=1", "eval.num_envs=1", "validate_every=2")
TINY_RUN = (*TINY, *ONCE, "diversity.states=2", "solver.steps=1")
# Script -> what runs it, and what makes it small.
SMALL: dict[str, tuple[Callable[[DictConfig, Path], Any], tuple[str, ...]]] = {
    "train": (_train, TINY_RUN),
    "evaluate": (lambda config, _: evaluate(config), ("episodes=1", "num_envs=1", "threads=1")),
    "export": (lambda config, _: export(config), ("episodes=0", "overwrite=true", "threads=1")),
    "push": (lambda config, _: push(config), ()),
    "inspect_data": (lambda config, _: inspect(config), ("samples=2", "threads=1")),
    "distill": (distill, ("updates=1", "eval.episodes=1", "logger=csv", "agent.actor.hidden=[8]", "threads=1")),
    "benchmark": (lambda config, _: benchmark(config), (*TINY_BENCHMARK, "threads=1", "precisions=[fp32]")),
    "reproduce": (_reproduce, ("dry=true", "seeds=1", "+settings.networks.hidden=[8]")),
    "generate": (_generate, ("episodes=1", "steps=20", "workers=1")),
}


@pytest.fixture(scope="module")
def place(tiny_data: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages' reader is in: the files and folders that they name."""
    place = tmp_path_factory.mktemp("place")
    for name, kind in (("scene", "play"), ("cube-single", "play"), ("puzzle-3x3", "play")):
        data = tiny_data(name, kind)
    for size in ("pointmaze-medium", "antmaze-medium", "antmaze-large"):
        tiny_data(size, "navigate")
    for link in ("DIR", "DATA"):
        (place / link).symlink_to(data)
    for link, name in (("DATA", "cube-single"), ("cube-single-play-v0", "cube-single"), ("scene-play-v0", "scene")):
        for suffix in (".npz", "-val.npz"):
            (place / f"{link}{suffix}").symlink_to(data / f"{name}-play-v0{suffix}")
    _write_robots(place)
    _write_tables(place)
    run = place / "logs" / "scene" / "2026-01-31_12-00-00"
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch)
        train(tiny_config(data, "experiment=scene", *ONCE, "diversity.states=0", "solver.steps=1"), run)
    (place / "RUN").symlink_to(run)
    (place / "PATH").symlink_to(run / CKPT)
    return place


def _write_robots(place: Path) -> None:
    """Data of one's own, in every format."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(80, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (80, 2)).astype(np.float32),
        "rewards": rng.random(80).astype(np.float32),
        "terminals": np.arange(1, 81) % 20 == 0,
        "timeouts": np.zeros(80, bool),
        "cut": np.zeros(80, bool),
    }
    np.savez(place / "robot.npz", **columns)
    with h5py.File(place / "robot.h5", "w") as file:
        file["robot/state"] = columns.pop("observations")
        for name, column in columns.items():
            file[name] = column
    write_d4rl(place / "pen-human-v1.hdf5", "pen")
    test_robomimic.write(place / "low_dim.hdf5")
    test_lerobot.write(place / "pusht")


def _write_tables(place: Path) -> None:
    """A table of one's own, as the page has it, and two files of results."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tables.md").read_text(), re.DOTALL)
    (place / "steps.yaml").write_text(text)
    (job,) = plan(layout("quick"), place / "made", place, 1, rows=["scene"], agents=["bc"])
    write_run(job, [0.5])
    for folder in ("before", "results", "docs/results"):
        (place / folder).mkdir(parents=True)
        write_results(place / folder / "quick.jsonl", [result_of(job)])


def small(command: Typed) -> tuple[str, ...]:
    """The overrides with which a command is run: its own, and in the place of some those that make it small."""
    chosen = {_key(word) for word in command.overrides}
    replacing = [word for word in SMALL[command.script][1] if _key(word) != "logger" or "logger" not in chosen]
    replacing += ["seeds=2"] * (command.script == "train" and "seeds" in chosen)
    replaced = {_key(word) for word in replacing}
    own = [re.sub(RUNS, "RUN/checkpoints/0_joint", word) for word in command.overrides if _key(word) not in replaced]
    return (*own, *replacing)


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


# Those that are the same command once they are small are run once.
TO_RUN = {(c.script, small(c)): c.text for c in COMMANDS if not c.reasons and c.script in SMALL}


@pytest.fixture(scope="module")
def kept() -> dict[Any, list[gymnasium.Env]]:
    """Environments that a test leaves to the next: to make one of OGBench's arms takes a second."""
    return defaultdict(list)


@pytest.fixture
def environments(kept: dict[Any, list[gymnasium.Env]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Short episodes, in environments that an earlier test has made, each given once."""
    make_env, given = ogbench.make_env, Counter[Any]()

    def make(name: str, **settings: Any) -> gymnasium.Env:
        settings = {"max_episode_steps": 20} | settings
        key = name, tuple(sorted(settings.items()))
        given[key] += 1
        if given[key] > len(kept[key]):
            kept[key].append(make_env(name, **settings))
        return kept[key][given[key] - 1]

    monkeypatch.setattr(ogbench, "make_env", make)


@pytest.mark.usefixtures("environments")
@pytest.mark.parametrize(("script", "overrides"), TO_RUN, ids=TO_RUN.values())
def test_commands_run(
    script: str, overrides: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(latency, "WARM_UP", 1)
    monkeypatch.setattr(latency, "CALLS", 5)
    config = compose_config(*overrides, config_name=script)
    if "data" in config.get("paths", {}) and not any(word.startswith("paths.data=") for word in overrides):
        config.paths.data = os.fspath(place / "DATA")
    if script in ("push", "benchmark", "inspect_data"):
        config.out = os.fspath(tmp_path / "out")
    SMALL[script][0](config, tmp_path / "run")


def test_a_run_is_resumed(place: Path) -> None:
    (words,) = {tuple(command.overrides) for command in COMMANDS if " resume=" in command.text}
    folder = place / words[0].removeprefix("resume=")
    (folder / SUMMARY_FILE).unlink()
    train(compose_config(*words), folder)
    assert (folder / SUMMARY_FILE).exists()
