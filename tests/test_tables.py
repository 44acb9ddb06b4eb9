"""Tables of configurations: what their rows say is known to the rest of the house."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from deflow.checks import check
from deflow.command_line import choices, look_in_own_folder
from deflow.config import CONFIG_DIR
from deflow.errors import UserError
from deflow.tables import read_table
from tests.conftest import compose_config
from tests.test_config import command

CONFIGS = Path(CONFIG_DIR)
STAGES = {*choices("stages")}
TUNED = sorted(path.stem for path in (CONFIGS / "tuned").glob("*.yaml"))


@pytest.mark.parametrize("table", ["task", *(f"tuned/{agent}" for agent in TUNED)])
def test_a_table_has_one_row_for_a_task(table: str) -> None:
    names = [name for name, _ in read_table(CONFIGS / f"{table}.yaml")]
    assert len(names) == len(set(names))
    assert {*names} <= {*choices("task")}
    if table in ("task", "tuned/deflow", "tuned/fql"):  # those of the papers' tables
        assert {*names, "custom"} == {*choices("task")}  # own data alone have nothing tuned


@pytest.mark.parametrize("agent", TUNED)
def test_every_number_of_a_table_is_a_setting(agent: str) -> None:
    data = {name: row["data"] for name, row in read_table(CONFIGS / "task.yaml")}
    rows = {f"{row} {data[task]}": (task, row) for task, row in read_table(CONFIGS / "tuned" / f"{agent}.yaml")}
    for task, row in rows.values():  # a row of several tasks once
        for stages in ("joint", "offline_to_online", "online") if STAGES & row.keys() else ("joint",):
            config = compose_config(f"task={task}", f"agent={agent}", f"stages={stages}")
            check(config)
            changed = row.get(stages, {} if stages == "joint" else row.get("offline_to_online", {}))
            for key, value in {**row, **changed}.items():
                assert key in STAGES or value == at(config, key)


def test_what_changes_online_changes_in_both_ways_there() -> None:
    def alpha(*overrides: str) -> object:
        return at(compose_config("task=antsoccer_arena", "agent=fql", *overrides), "agent.actor.alpha")

    assert [alpha(f"stages={stages}") for stages in ("joint", "offline_to_online", "online")] == [10, 30, 30]
    assert alpha("stages=online", "agent.actor.alpha=7") == 7
    assert at(compose_config("task=pen-cloned-v1", "agent=fql", "stages=online"), "agent.actor.alpha") == 1000


def at(config: DictConfig, key: str) -> object:
    node = config
    for name in key.split("."):
        node = node[name]
    return node


def test_a_key_of_a_table_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    for path in CONFIGS.rglob("*.yaml"):
        copied = tmp_path / path.relative_to(CONFIGS)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(path.read_text().replace("agent.trust_region: 0.005", "agent.trust_regoin: 0.005"))
    with initialize_config_dir(str(tmp_path), version_base=None):
        check(compose("train", ["task=scene"]))
        with pytest.raises(UserError, match=r"no setting 'agent.trust_regoin': did you mean 'agent.trust_region'"):
            check(compose("train", ["task=puzzle_3x3"]))


def test_a_row_gives_way_to_the_experiment_and_to_the_command_line() -> None:
    tuned = "agent.trust_region"
    assert at(compose_config("task=puzzle_3x3"), tuned) == 0.005
    assert at(compose_config("task=puzzle_3x3", "agent.trust_region=1"), tuned) == 1
    assert compose_config("task=pen-human-v1", "updates=7").updates == 7
    quickstart = compose_config("experiment=quickstart", "task=antmaze_large")
    assert (quickstart.updates, quickstart.tau, quickstart.task.env) == (10_000, 0.02, "antmaze-large")
    assert (compose_config("task=antmaze_large").tau, compose_config("task=visual_scene").updates) == (0.005, 500_000)


def test_a_task_brings_its_own_data_unless_others_are_asked_for() -> None:
    def source(*overrides: str) -> str:
        return compose_config(*overrides).data.source._target_.rpartition(".")[2]

    assert source("task=scene") == "OGBenchSource"
    assert source("task=pen-human-v1") == "D4RLSource"
    assert source("task=custom", "data.source.path=a.npz") == "CustomSource"
    assert source("experiment=minari", "data.source.dataset_id=a") == "MinariSource"
    assert source("task=pen-human-v1", "data=minari", "data.source.dataset_id=a") == "MinariSource"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A folder of a user's own configurations, for as long as the test takes."""
    files = {
        "task": "mymaze: {data: ogbench, env: pointmaze-medium, dataset: navigate, discount: 0.9, updates: 3}",
        "tuned/mine": "mymaze, scene: {agent.horizon: 3, offline_to_online: {agent.horizon: 4}}\n"
        "cube_single: {offline_to_online: {agent.horizon: 4}, online: {agent.horizon: 5}}",
        "tuned/fql": "scene: {agent.actor.alpha: 7}",
        "agent/mine": (CONFIGS / "agent" / "flow_bc.yaml").read_text(),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    look_in_own_folder(tmp_path)
    yield tmp_path
    look_in_own_folder(None)


def fresh(*overrides: str) -> DictConfig:
    """As `compose_config`, which remembers what it composed."""
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        return compose("train", list(overrides))


@pytest.mark.usefixtures("own")
def test_a_folder_of_ones_own_has_tables_as_well() -> None:
    mine = fresh("task=mymaze", "agent=mine")
    assert (mine.updates, mine.task.name, mine.agent.horizon) == (3, "mymaze", 3)
    assert fresh("experiment=mymaze", "agent=mine", "stages=offline_to_online").agent.horizon == 4
    assert fresh("task=scene", "agent=mine").agent.horizon == 3
    assert fresh("task=scene", "agent=mine", "stages=online").agent.horizon == 4
    assert fresh("task=cube_single", "agent=mine", "stages=online").agent.horizon == 5  # its own goes before
    assert fresh("task=scene", "agent=fql").agent.actor.alpha == 7  # goes before the house's
    assert fresh("task=cube_single", "agent=fql").agent.actor.alpha == 300
    assert "mine" in choices("agent")
    assert {"mymaze", "scene"} <= {*choices("task")}
    look_in_own_folder(None)
    assert "mymaze" not in choices("task")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("mine: {env: scene}", "mine needs data, a choice of the group data"),
        ("mine: 3", "must have rows such as NAME: {key: value}"),
        ("- mine", "must have rows such as NAME: {key: value}"),
        ("mine: {env: [}", "cannot be read: while parsing a flow node"),
    ],
)
def test_a_table_that_is_none_is_one_line(table: str, says: str, own: Path) -> None:
    (own / "task.yaml").write_text(table)
    with pytest.raises(UserError) as raised:
        fresh("task=scene")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("flag", ["--config-dir", "-cd"])
def test_flags_may_stand_between_overrides(
    flag: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", ["task=mymaze", flag, str(own), "agent=mine", "--help"], monkeypatch) == 0
    text = capsys.readouterr().out
    assert "With task=mymaze agent=mine:" in text
    assert "agent.horizon=3 " in text
    assert command("train", ["task=mymaze", flag, str(own), "agent.horizom=1"], monkeypatch) == 2
    assert "did you mean 'agent.horizon'?" in capsys.readouterr().err
    assert command("train", ["task=mymaze", flag, str(own / "nowhere"), "agent=mine"], monkeypatch) == 2
    assert capsys.readouterr().err == f"error: --config-dir: no folder {own / 'nowhere'}\n"


@pytest.mark.parametrize("choice", ["null", "fql", "nonsense"])
def test_what_is_tuned_is_not_chosen(
    choice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", ["task=scene", f"tuned={choice}"], monkeypatch) == 2
    assert "what is tuned follows agent= and task=" in capsys.readouterr().err
    assert fresh("task=puzzle_3x3", "~tuned").agent.trust_region == 0.001
