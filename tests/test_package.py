"""The wheel stands alone: installed elsewhere, it trains by its command and from a program, and says its mistakes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import deflow
from deflow import commands, invocation
from deflow.agents.base import Agent
from deflow.errors import UserError
from tests.commands import HANGS, ROOT, TINY, tiny_overrides


def call(command: Sequence[str | Path], cwd: Path) -> str:
    """The output of a command that does not find this repository; fails with its errors."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    build = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    call(build, cwd=source)
    return next((source / "dist").glob("deflow-*.whl"))


@pytest.fixture(scope="module")
def bin_folder(wheel: Path) -> Path:
    """Of a fresh environment with the wheel, in which this one's other packages are found as well."""
    home = wheel.parent / "environment"
    call((sys.executable, "-m", "venv", "--without-pip", home), cwd=wheel.parent)
    python = home / "bin" / "python"
    call((sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel), cwd=wheel.parent)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def test_the_image_has_what_a_policy_needs_on_its_way_to_the_robot() -> None:
    (extras,) = re.findall(r"'\./source\[([\w,]+)\]'", (ROOT / "Dockerfile").read_text())
    assert {"export", "hub", "page", "serve"} <= {*extras.split(",")}


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    patterns = ("*.py", "*.safetensors", "*.html")
    source = {path.relative_to(ROOT / "src") for pattern in patterns for path in files("src", pattern)}
    configs = [path for pattern in ("*.yaml", "*.csv") for path in files("configs", pattern)]
    source |= {Path("deflow") / path.relative_to(ROOT) for path in configs}
    packed = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == source


def files(folder: str, pattern: str) -> list[Path]:
    return list((ROOT / folder).rglob(pattern))


@pytest.mark.slow
def test_what_is_installed_trains(bin_folder: Path, point_data: Path, tmp_path: Path) -> None:
    settings = ("trainer=ddp_sim", "eval.every=6", "diversity.states=0")  # ddp_sim starts the command once more
    call((bin_folder / "deflow", "train", *tiny_overrides(point_data, tmp_path / "run", *settings)), cwd=tmp_path)
    program = "import deflow; print(deflow.__file__, *deflow.load('run').act([0.0, 0.0]).shape)"
    home, size = call((bin_folder / "python", "-c", program), cwd=tmp_path).split()
    assert Path(home).is_relative_to(bin_folder.parent)
    assert size == "2"


def type_in(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["deflow", *arguments])
    monkeypatch.setattr(invocation, "_typed", "")  # put back after the test
    commands.console()


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_commands_are_listed(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, *arguments)
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    commands = ["train", "evaluate", "serve", "export", "push", "generate", "inspect", "distill", "benchmark"]
    assert listed == [*commands, "reproduce", "train-expert"]


def test_help_speaks_of_the_command_that_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "train", "--help")
    assert "deflow train experiment=" in (shown := capsys.readouterr().out)
    assert "train.py" not in shown


def test_an_unknown_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        type_in(monkeypatch, "nonsense")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no command 'nonsense': choose one of train, evaluate, ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "unknown experiment 'nonsense': choose one of antmaze, "),
        (["pointmaze", "agent.nonsense=1"], "no setting 'agent.nonsense'"),
        (["pointmaze", "seed=abc"], "seed must be a whole number from 0 to 4294967295, got 'abc'"),
        (["pointmaze", "trainer=ddp_sim"], "a run of several processes is started by a command"),
        (["custom"], "Missing mandatory value: data.source.path"),
        (["resume=nowhere"], "nowhere is not a run to resume"),
        (["resume=.", "updates=5"], "resume= keeps the run's own configuration: drop updates=5"),
    ],
)
def test_a_program_gets_the_mistake_as_an_exception(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()  # as a run has one
    with pytest.raises(UserError) as raised:
        deflow.train(*arguments)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert os.listdir() == ["config.yaml"]


@pytest.mark.usefixtures("short_episodes")
def test_a_program_is_interrupted_and_goes_on(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*TINY, f"paths.data={point_data}", f"paths.logs={tmp_path}")
    step = Agent.training_step

    def interrupted(agent: Agent, *arguments: object) -> object:
        if agent.run_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(agent, *arguments)

    monkeypatch.setattr(Agent, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        deflow.train("pointmaze", *settings, "trust=[mylab]")
    monkeypatch.setattr(Agent, "training_step", step)
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    assert str(stopped.value) == f'stopped by SIGINT: go on by deflow.train("resume={folder}", "trust=[mylab]")'
    assert deflow.train(f"resume={folder}")["updates"] == 6


def test_what_building_and_running_leave_is_not_committed() -> None:
    left = [
        "build/lib/deflow/policy.py",
        "dist/deflow.whl",
        "site/index.html",
        "results/quick.md",
        "logs/run/summary.json",
    ]
    ignored = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout.split() == left
