"""The documentation's site: it builds without a warning, reads without a network, and shows what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deflow.command_line import choices
from deflow.reproduction.results import Result, read_results
from deflow.reproduction.table import cells_of, markdown, summary, texts
from tests.commands import HANGS, ROOT

FETCHED = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^\"'\s>]+")
FETCHED_BY_STYLE = re.compile(r"(?:url\([\"']?|@import [\"'])(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr  # a dead link, a page in no menu, a name that a file lacks
    return folder


def test_no_page_asks_for_anything_from_the_network(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(pages) > 30
    assert {str(path): FETCHED.findall(text) for path, text in pages.items() if FETCHED.search(text)} == {}
    assert [path for path in site.rglob("*.css") if FETCHED_BY_STYLE.search(path.read_text())] == []


def test_formulas_need_no_script(site: Path) -> None:
    losses, agents = ((site / name).read_text() for name in ("losses.html", "api/agents.html"))
    assert losses.count("<math") > 50
    assert "<math" in agents  # of docstrings
    assert not re.search(r"<p>[^<]*\.\. math::", agents)
    for text in (losses, agents):
        assert "arithmatex" not in text
        assert not re.search(r"<m[ion][^>]*>(\\\w+|&amp;|&)</m", text)  # what the converter did not know


def test_every_agent_has_its_losses(site: Path) -> None:
    text = (site / "losses.html").read_text()
    assert {name for name in choices("agent") if f"<code>agent={name}</code>" not in text} == set()
    links = re.findall(r'href="(source/[^"#]+)#([\w-]+)"><code>', text)
    assert len(links) > 30
    for page, anchor in links:
        assert f'"{anchor}"' in (site / page).read_text()


def test_every_setting_is_shown_with_its_comment(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "settings").glob("*.html"))
    for group in ("agent", "data", "stages", "solver", "iav", "trainer", "logger", "engine"):
        assert {name for name in choices(group) if f"<code>{group}={name}</code>" not in pages} == set()
    for shown in (
        "agent.trust_region",
        "stages.online.environment.capacity",
        "data.source.keys.timeouts",
        "eval.every",
    ):
        assert f"<code>{shown}</code>" in pages
    assert "used by agents that can do without the noise behind a proposal" in pages  # a comment of two lines


def test_a_table_is_that_of_the_records_beside_it() -> None:
    results = read_results(ROOT / "docs/results/quick.jsonl")
    page = (ROOT / "docs/results/agents.md").read_text()
    for line in (markdown("quick", cells_of("quick", results)) + summary(results)).splitlines():
        assert not line.startswith("|") or line in page


def test_a_curve_is_that_of_the_records_beside_it() -> None:
    page = (ROOT / "docs/results/agents.md").read_text()
    shown = {
        "cac": "CAC",
        "idql": "IDQL",
        "ifql": "IFQL",
        "flow_bc": "flow BC",
        "srpo": "SRPO",
        "fawac": "FAWAC",
        "fbrac": "FBRAC",
    }
    results = read_results(ROOT / "docs/results/agents.jsonl")
    cells = cells_of("agents", results)
    assert {cell.agent for cell in cells} == set(shown)
    for cell in cells:
        curves = [result.curve.values() for result in results if (result.row, result.agent) == (cell.row, cell.agent)]
        quarters = [", ".join(f"{value:.0f}" for value in quarter) for quarter in zip(*curves, strict=True)]
        task, _, _, mean, interval, *_ = texts(cell)
        assert f"| {task} | {shown[cell.agent]} | {' | '.join(quarters)} | {mean} | {interval} |" in page


def test_a_maze_is_that_of_the_records_beside_it() -> None:
    lines = (ROOT / "docs/transitions.md").read_text().splitlines()
    results = read_results(ROOT / "docs/results/models.jsonl")
    shown = [line.split(" | ", 2)[2] for line in lines if line.startswith("| ") and line.count(" | ") == 8]
    for agent in {result.agent for result in results}:
        runs = [result for result in results if result.agent == agent]
        quarters = [", ".join(f"{value:.0f}" for value in quarter) for quarter in zip(*map(curve, runs), strict=True)]
        correlation = ", ".join(f"{run.correlation:.2f}" for run in runs)
        assert any(line.startswith(f"{' | '.join(quarters)} | {correlation} | ") for line in shown), agent


def curve(result: Result) -> list[float]:
    return list(result.curve.values())
