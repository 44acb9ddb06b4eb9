"""The published numbers agree with one another, and each names a run of this house."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import mean

import pytest

from deflow.command_line import choices
from deflow.errors import UserError
from deflow.reproduction.published import AVERAGE, Published, find, overrides, published, tables
from tests.conftest import compose_config

ROUNDING = 1.0  # some papers cut the decimals off


def test_the_tables_have_the_papers_cells() -> None:
    counts = {table: len(published(table)) for table in tables()}
    assert counts == {
        "d4rl_adroit": 12 * 10 + 11,
        "d4rl_antmaze": 6 * 10 + 11,
        "offline_to_online": 15 * 7,
        "ogbench_state": 10 * (5 * 10 + 11),
        "ogbench_visual": 5 * 5 + 6,
        "optiflow_state": 10 * 6,
    }


@pytest.mark.parametrize("table", tables())
def test_a_cell_is_there_once_and_complete(table: str) -> None:
    cells = published(table)
    assert len({(cell.row, cell.task, cell.agent) for cell in cells}) == len(cells)
    assert {cell.agent for cell in cells} <= {*choices("agent")}
    online = table == "offline_to_online"
    for cell in cells:
        assert (cell.mean is None, cell.before is None, cell.after is None) == (online, not online, not online)
        assert cell.source
        assert cell.seeds in (4, 8) or (cell.seeds is None and " in FQL" in cell.source)


def test_the_means_over_the_tasks_are_the_published_ones() -> None:
    numbers = defaultdict(list)
    for cell in published("ogbench_state"):
        if cell.task is not None:
            numbers[cell.row, cell.agent].append(cell.mean)
    assert len(numbers) == 10 * 10
    for (row, agent), values in numbers.items():
        assert len(values) == 5
        assert mean(values) == pytest.approx(the_mean("ogbench_state", row, agent), abs=ROUNDING), (row, agent)


@pytest.mark.parametrize("table, rows", [("ogbench_visual", 5), ("d4rl_antmaze", 6), ("d4rl_adroit", 12)])
def test_the_means_over_the_rows_are_the_published_ones(table: str, rows: int) -> None:
    numbers = defaultdict(list)
    for cell in published(table):
        if cell.row != AVERAGE:
            numbers[cell.agent].append(cell.mean)
    for agent, values in numbers.items():
        assert len(values) == rows
        assert mean(values) == pytest.approx(the_mean(table, AVERAGE, agent), abs=ROUNDING), agent


def the_mean(table: str, row: str, agent: str, task: int | None = None) -> float | None:
    cell = find(table, row, agent, task)
    return None if cell is None else cell.mean


def test_cells_by_hand() -> None:
    fql, deflow = "FQL (arXiv 2502.02538)", "DeFlow (arXiv 2601.10471)"
    assert find("ogbench_state", "cube-single", "fql", 2) == Published(
        "cube-single", 2, "fql", 97, None, 8, f"{fql} table 3"
    )
    assert find("ogbench_state", "cube-double", "deflow") == Published("cube-double", None, "deflow", 40, 5, 8, deflow)
    assert find("offline_to_online", "puzzle-4x4", "fql") == Published(
        "puzzle-4x4", 4, "fql", None, None, 8, fql, before=8, after=38
    )
    assert find("offline_to_online", "pen-cloned-v1", "cal_ql") == Published(
        "pen-cloned-v1", None, "cal_ql", None, None, None, f"CORL, in {fql}", before=-3, after=-3
    )
    assert the_mean("ogbench_visual", "visual-scene", "fql") == 98
    assert the_mean("d4rl_adroit", "relocate-expert-v1", "rebrac") == 108
    assert the_mean("d4rl_antmaze", "antmaze-large-diverse-v2", "idql") == 68
    assert the_mean("optiflow_state", "humanoidmaze-large", "idql") == 0.4


def test_what_is_not_published_is_none() -> None:
    assert find("ogbench_state", "cube-single", "deflow", 2) is None
    assert find("d4rl_adroit", "pen-human-v1", "deflow") is None


@pytest.mark.parametrize("table", tables())
def test_every_row_names_a_task_of_this_house(table: str) -> None:
    known = {*choices("task")}
    cells = {(cell.row, cell.task) for cell in published(table) if cell.row != AVERAGE}
    for row, task in cells:
        if (table, task) == ("ogbench_state", None):
            continue
        chosen, *task_id = overrides(table, row, 3 if table == "optiflow_state" else task)
        assert chosen.removeprefix("task=") in known
        assert task_id == [] if row.endswith(("-v1", "-v2")) else len(task_id) == 1


@pytest.mark.parametrize(
    "table, row, task, env, task_id",
    [
        ("ogbench_state", "antmaze-giant", 5, "antmaze-giant", 5),
        ("optiflow_state", "puzzle-3x3", 1, "puzzle-3x3", 1),
        ("ogbench_visual", "visual-cube-double", None, "visual-cube-double", 1),
        ("offline_to_online", "antsoccer-arena", None, "antsoccer-arena", 4),
        ("d4rl_antmaze", "antmaze-umaze-diverse-v2", None, None, None),
        ("d4rl_adroit", "door-expert-v1", None, None, None),
    ],
)
def test_a_row_composes(table: str, row: str, task: int | None, env: str | None, task_id: int | None) -> None:
    config = compose_config(*overrides(table, row, task))
    assert (config.task.get("env"), config.task_id) == (env, task_id)
    assert config.task.name.replace("_", "-") == row


def test_the_online_tasks_are_the_environments_default_ones() -> None:
    tasks = {cell.row: cell.task for cell in published("offline_to_online") if cell.task is not None}
    assert tasks == {"humanoidmaze-medium": 1, "antsoccer-arena": 4, "cube-double": 2, "scene": 2, "puzzle-4x4": 4}


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda: published("nonsense"), "unknown table 'nonsense': choose one of d4rl_adroit, d4rl_antmaze, offl"),
        (
            lambda: find("ogbench_state", "cube_single", "fql"),
            "of ogbench_state 'cube_single': choose one of antmaze-",
        ),
        (lambda: find("optiflow_state", "scene", "deflow"), "'deflow': choose one of bc, iql, rebrac, idql, ifql, fql"),
        (
            lambda: overrides("ogbench_state", "scene"),
            "of ogbench_state is a mean over tasks: choose one of 1, 2, ",
        ),
        (
            lambda: overrides("ogbench_visual", "visual-scene", 3),
            "task of visual-scene in ogbench_visual '3': choose one of 1",
        ),
        (lambda: overrides("optiflow_state", "scene", 6), "'6': choose one of 1, 2, 3, 4, 5"),
        (
            lambda: overrides("d4rl_adroit", AVERAGE),
            "is a mean over others: choose one of pen-human-v1, pen-",
        ),
        (
            lambda: overrides("d4rl_adroit", "pen-human-v1", 1),
            "of d4rl_adroit is one task: leave out task 1",
        ),
    ],
)
def test_a_wrong_name_lists_the_right_ones(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError) as raised:
        wrong()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
