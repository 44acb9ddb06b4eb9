"""`--help`: a screen about each command, made of its YAML file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from deflow.config import CONFIG_DIR
from deflow.help import WIDTH, help_text
from deflow.sections import SETTINGS_OF
from tests.test_config import command

CONFIGS = Path(CONFIG_DIR)
SCREEN = 60  # lines


def shown(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    assert command(name, arguments, monkeypatch, lambda *_: pytest.fail("began")) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_every_command_has_a_screen_with_examples_that_compose(name: str) -> None:
    lines = help_text(CONFIGS, name, []).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= WIDTH
    examples = [re.sub(" +#.*", "", line) for line in lines if line.startswith(f"  python {name}.py")]
    assert len(examples) == 5
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        for example in examples:
            arguments = [argument for argument in shlex.split(example)[2:] if not argument.startswith("-")]
            compose(name, [argument.partition(",")[0] if "-m" in example else argument for argument in arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--help", "seed=0"], ["agent=fql", "--help"]])
def test_settings_stand_with_their_comments(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("train", arguments, monkeypatch, capsys)
    assert re.search(r"^  checkpoint_every=10_000 +updates; a killed run loses at most these$", text, re.MULTILINE)
    assert re.search(r"^  seeds=1 +runs in one process, from `seed` on$", text, re.MULTILINE)  # as much as fits


def test_groups_list_their_choices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = shown("train", ["--help"], monkeypatch, capsys).split()
    assert {
        "cal_{ql,ql_original}",
        "{door,hammer,pen,relocate}-{cloned,expert,human}-v1",
        "online/TASK",
        "quickstart",
    } <= {*words}
    assert not any("tuned" in word for word in words)


@pytest.mark.parametrize("order", [1, -1])
def test_an_experiment_shows_its_values(
    order: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("train", ["--help", "experiment=antmaze"][::order], monkeypatch, capsys)
    for value in ("env=antmaze-large", "name=antmaze_large", "agent.trust_region=0.01 ", "agent.critic.aggregate=min"):
        assert value in text
    assert "delta, the limit of the mean squared residual" in text  # from the agent's own file
    assert "updates=10_000" in shown("train", ["--help", "experiment=quickstart"][::order], monkeypatch, capsys)


def test_a_variant_shows_the_settings_that_it_has_in_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("train", ["--help", "agent=rlpd_original", "agent/critic=ensemble"], monkeypatch, capsys)
    for setting in ("target_members=2", "horizon=1", "critic.members=10", "actor.log_std_range=[-20,2]"):
        assert text.count(f"  agent.{setting} ") == 1
    assert "defaults" not in text


def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", ["--help", "experiment=nonsense"], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown experiment 'nonsense': choose one of antmaze, " in line
