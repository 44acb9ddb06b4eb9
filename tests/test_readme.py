"""What the README and the pages in docs say is so; their commands are in `test_documented.py`."""

from __future__ import annotations

import re
import subprocess
from functools import partial

import torch

from deflow.agents.base import Agent
from deflow.command_line import choices
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.types import Spec
from tests.agents.tester import check_agent
from tests.commands import ROOT
from tests.conftest import compose_config

README = (ROOT / "README.md").read_text()
DATA, ADDING_AN_AGENT = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("data", "adding_an_agent"))


def test_the_first_commands_are_make() -> None:
    commands = re.findall(r"^    (make \w+)", README, re.MULTILINE)
    assert commands[:2] == ["make train", "make test"]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in commands} <= targets


def test_make_ui_shows_the_runs_of_any_folder() -> None:
    dry = ("make", "--dry-run", "--assume-old=.venv/.installed", "ui", "LOGS=/elsewhere")
    command = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "sqlite:////elsewhere/mlflow.db" in command
    assert "--artifacts-destination /elsewhere/mlartifacts" in command


def test_the_page_on_data_names_every_source() -> None:
    assert set(re.findall(r"^\| `data=(\w+)`", DATA, re.MULTILINE)) == {*choices("data")}


def test_swaps_exist() -> None:
    for group, names in re.findall(r"(agent|solver|stages|trainer|logger)=([\w|]+)", README):
        for choice in names.split("|"):
            compose_config(f"{group}={choice}")


def test_the_table_names_every_experiment_with_its_settings() -> None:
    rows = re.findall(r"^\| (`.*) \| .* \| ([\d.]+) \| (\w+) \|$", README, re.MULTILINE)
    named = {name: (float(delta), agg) for names, delta, agg in rows for name in re.findall(r"`([\w-]+)`", names)}
    without_a_task = {"original_comparison", "custom", "minari"}
    assert set(named) == {*choices("experiment")} - without_a_task
    for name, (delta, aggregate) in named.items():
        agent = compose_config(f"experiment={name}").agent
        assert (agent.trust_region, agent.critic.aggregate) == (delta, aggregate), name


def test_the_example_agent_works() -> None:
    blocks = re.findall(r"```python\n(.*?)```", ADDING_AN_AGENT, re.DOTALL)
    (code,) = [block for block in blocks if "class FlowBC" in block]
    names: dict = {"Agent": Agent, "torch": torch}
    exec(code, names)  # the page's own text
    flow = partial(BehaviorFlow, hidden=(16,))
    agent = names["FlowBC"](Spec(5, 3), flow, partial(torch.optim.Adam, lr=3e-4))
    check_agent(agent)
