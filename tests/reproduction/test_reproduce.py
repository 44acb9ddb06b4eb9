"""From a table's name to its runs, and from runs to the table."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf

from deflow.agents.base import Agent
from deflow.command_line import quoted
from deflow.config import plain
from deflow.data.datamodule import BatchStream
from deflow.errors import UserError
from deflow.reproduction import runs
from deflow.reproduction.layout import layout, names
from deflow.reproduction.page import page
from deflow.reproduction.plan import (
    Job,
    commands,
    is_technical,
    plan,
    refuse_other_configuration,
    refuse_other_settings,
)
from deflow.reproduction.plots import profile_title, profiles
from deflow.reproduction.reproduce import (
    _arguments,
    _check_evaluations,
    _checked,
    _done,
    _seconds,
    _seconds_left,
    _sharing_cores,
    _write,
    reproduce,
    updates_of,
)
from deflow.reproduction.results import (
    Result,
    read_results,
    refuse_mixture,
    result_of,
    why_not_published,
    write_results,
)
from deflow.reproduction.runs import run_all
from deflow.reproduction.table import cells_of, compare, latex, markdown, poolable, summary, tolerance
from deflow.reproduction.tracking import track
from deflow.signals import Stopped
from deflow.stored import load_config
from tests.commands import run as run_command
from tests.commands import start
from tests.conftest import compose_config
from tests.reproduction.runs import as_if_generated, write_run


def jobs_of(folder: Path, table: str = "ogbench_state", seeds: int = 2, **chosen: Any) -> list[Job]:
    return plan(layout(table), folder / "logs", folder / "data", seeds, **chosen)


# The plan.


@pytest.mark.parametrize(
    "table,rows,count",
    [
        ("ogbench_state", None, 10 * 5 * 11),
        ("ogbench_state", ["cube-single"], 5 * 11),
        ("d4rl_antmaze", None, 6 * 11),  # of DeFlow only the mean is published; it runs all the same
        ("offline_to_online", ["antmaze-umaze-v2"], 7),
        ("quick", None, 2 * 5),
        ("agents", None, 2 * 12),
    ],
)
def test_every_cell_of_a_table_is_a_run(table: str, rows: list[str] | None, count: int, tmp_path: Path) -> None:
    found = jobs_of(tmp_path, table, seeds=1, rows=rows)
    assert len(found) == len({job.folder for job in found}) == count


@pytest.mark.parametrize("table", names())
def test_every_run_can_be_composed(table: str, tmp_path: Path) -> None:
    of_agents = {job.agent: job for job in jobs_of(tmp_path, table, seeds=1)}
    for job in of_agents.values():
        config = compose_config(*job.settings)
        _check_evaluations(job, config)
        assert config.logger._target_.endswith("csv_only")


def test_stages_are_those_of_the_agent(tmp_path: Path) -> None:
    chosen = {"rows": ["antmaze-umaze-v2"], "agents": ["rlpd", "fql"], "seeds": 1}
    assert [job.settings[2] for job in jobs_of(tmp_path, "offline_to_online", **chosen)] == [
        "stages=from_scratch",
        "stages=offline_to_online",
    ]


@pytest.mark.parametrize(
    "table,chosen,says",
    [
        ("nothing", {}, "unknown table 'nothing': choose among d4rl_adroit, .* or name a file, NAME.yaml"),
        ("quick", {"rows": ["cube"]}, "unknown row of quick 'cube': choose among cube-single, scene"),
        ("quick", {"agents": ["sac"]}, "unknown agent of quick 'sac': choose among bc, iql, rebrac, fql, deflow"),
        ("ogbench_visual", {"tasks": [3]}, "unknown task of visual-cube-single in ogbench_visual '3': choose among 1"),
        ("ogbench_state", {"rows": ["scene"], "tasks": [1, 9]}, "'9': choose among 1, 2, 3, 4, 5"),
        ("ogbench_state", {"agents": []}, "an empty list chooses nothing"),
        ("quick", {"settings": ["seed=3"]}, "seed is the table's to set"),
        ("quick", {"settings": ["agent=fql"]}, "agent is the table's to set"),
        ("quick", {"settings": ["task_id=3"]}, "task_id is the table's to set"),
    ],
)
def test_what_is_not_there_lists_what_is(table: str, chosen: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        jobs_of(tmp_path, table, **chosen)


def test_a_dry_run_says_what_would_be_typed(tmp_path: Path) -> None:
    made, begun, missing = jobs_of(tmp_path, "quick", seeds=3, rows=["scene"], agents=["bc"])
    write_run(made, [0.5])
    begun.folder.mkdir(parents=True)
    (begun.folder / "config.yaml").touch()
    generates, goes_on, starts = commands([made, begun, missing], threads=2)
    assert generates.startswith("python generate.py dataset=scene-play-v0 ")
    assert goes_on == f"python train.py resume={begun.folder}"
    assert starts.endswith(f"seed=2 logger=csv hydra.run.dir={missing.folder} threads=2")


def test_what_is_typed_survives_a_shell(tmp_path: Path) -> None:
    (job,) = jobs_of(
        tmp_path / "my logs", seeds=1, rows=["scene"], agents=["fql"], tasks=[1], settings=["b=it's [8, 8]"]
    )
    (command,) = commands([job], threads=1)
    assert shlex.split(command)[2:] == list(job.arguments(threads=1))


@pytest.mark.parametrize(
    "name", ["my,data", "run (old)", "a=b", "it's", "{x}", "my data", "[1]", "~a-b_c+d@e:f.g", "é"]
)
def test_any_folder_will_do(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    job = plan(layout("quick"), folder, folder, 1)[0]
    composed = compose_config(*job.settings)
    assert job.dataset is not None
    assert composed.data.source.path == str(job.dataset.path)
    assert job.dataset.is_named_by(job.dataset.setting)
    parse = OverridesParser.create().parse_override
    assert parse(job.dataset.arguments[1]).value() == str(job.dataset.path.parent)
    assert parse(job.arguments(threads=1)[-2]).value() == str(job.folder)
    (published, *_) = plan(layout("d4rl_antmaze"), folder, folder, 1)
    assert compose_config(*published.settings).paths.data == str(folder)
    config = compose_config(f"+settings.data.source.dir={quoted(str(folder))}", config_name="reproduce")
    (setting,) = _arguments(plain(config.settings))
    assert parse(setting).value() == str(folder)


def test_an_estimate_is_of_what_each_stage_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config("agent=deflow", "stages=staged", "updates=1000", "networks.hidden=[8]")
    trained: list[set[str]] = []

    def seconds(agent: Agent, stream: BatchStream) -> float:
        trained.append({part for part in agent.parts if agent.trains(part)})
        assert (next(iter(stream)).base_actions is None) == (len(trained) <= 2)
        return 3.0 if len(trained) <= 2 else 6.0

    monkeypatch.setattr("deflow.reproduction.reproduce.seconds_of_updates", seconds)
    speeds = _seconds(config, threads=1)
    assert speeds == {"behavior": 1.0, "extraction": 2.0}
    assert trained[0] == {"behavior_flow"}
    assert "behavior_flow" not in trained[-1]
    assert [_seconds_left(config, done, speeds) for done in (0, 400, 1000, 1500, 2000)] == [3000, 2600, 2000, 1000, 0]


def test_stages_whose_rate_falls_are_timed_too() -> None:
    config = compose_config("agent=srpo", "stages=srpo", "networks.hidden=[8]", "data.batch_size=8")
    speeds = _seconds(config, threads=1)
    assert list(speeds) == ["behavior", "values", "policy"]
    assert min(speeds.values()) > 0


def test_a_mean_of_three_evaluations_needs_three(tmp_path: Path) -> None:
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1, settings=["updates=1000", "eval.every=500"])
    with pytest.raises(
        UserError, match="shows its mean of last three, and its last stage, 'joint', of 1000 updates has 2"
    ):
        _checked(job)
    _checked(replace(job, settings=(*job.settings, "eval.every=499")))
    with pytest.raises(UserError, match="plays in no environment: take stages=offline_to_online"):
        _checked(replace(job, value="before_and_after"))
    _checked(replace(job, value="last"))


def test_runs_side_by_side_share_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deflow.reproduction.reproduce.usable_cores", lambda: 64)
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    assert _sharing_cores(job, 1) == job
    assert _sharing_cores(job, 64).settings == (*job.settings, "eval.num_envs=2")
    assert _sharing_cores(job, 3).settings[-1] == "eval.num_envs=23"
    asked = replace(job, settings=(*job.settings, "eval.num_envs=7"))
    assert _sharing_cores(asked, 64) == asked
    write_run(job, [0.5])
    refuse_other_settings([_sharing_cores(job, 64)])  # it is not another run


def test_what_a_run_has_done_is_not_counted_again(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run(), tmp_path / "run"))
    (job, *_), config = jobs_of(tmp_path, "quick", seeds=1), load_config(folder / "config.yaml")
    job = replace(job, folder=folder)
    assert updates_of(job, config) == 6
    assert updates_of(replace(job, folder=tmp_path / "nothing"), config) == 0
    next(folder.glob("checkpoints/*/final.ckpt")).write_bytes(b"half")
    assert updates_of(job, config) == 0


# Running it.


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(tmp_path, "quick", seeds=3, rows=["scene"], agents=["bc"])
    places = {job.folder: job for job in jobs}
    calls: list[str] = []

    def fake(command: str, arguments: Sequence[str], output: Path, apart: bool) -> int:
        job = next(job for folder, job in places.items() if any(str(folder) in word for word in arguments))
        calls.append(arguments[0])
        if job.seed == 1 and len(calls) <= 3:
            (job.folder / "config.yaml").parent.mkdir(parents=True)
            (job.folder / "config.yaml").touch()
            return 1
        (job.folder / "config.yaml").unlink(missing_ok=True)
        if job.folder.exists():
            job.folder.rmdir()
        write_run(job, [0.5])
        return 0

    monkeypatch.setattr(runs, "_run", fake)
    (said,) = run_all(jobs, at_once=2, threads=1)
    assert said == f"bc on scene task 1, seed 1 failed, see {jobs[1].folder}.log"
    assert [job.state for job in jobs] == ["done", "begun", "done"]
    assert run_all(jobs, at_once=1, threads=1) == []
    assert len(calls) == 4  # nothing twice
    assert calls[-1] == f"resume={jobs[1].folder}"


def test_a_run_that_cannot_be_made_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = jobs_of(tmp_path, "quick", seeds=3, rows=["scene"], agents=["bc"])

    def fake(command: str, arguments: Sequence[str], output: Path, apart: bool) -> int:
        if str(first.folder) in " ".join(arguments):
            raise OSError(28, "No space left on device")
        write_run(second if str(second.folder) in " ".join(arguments) else third, [0.5])
        return 0

    monkeypatch.setattr(runs, "_run", fake)
    (said,) = run_all([first, second, third], at_once=2, threads=1)
    assert said == "bc on scene task 1, seed 0 could not be made ([Errno 28] No space left on device)"
    assert [job.state for job in (first, second, third)] == ["missing", "done", "done"]


def fake_runs(monkeypatch: pytest.MonkeyPatch, first: Callable[[Job], list[str]]) -> None:
    """Let a table's first run be done by `first`, which returns what is to be said of the others, or raises."""
    module = "deflow.reproduction.reproduce"
    monkeypatch.setattr(f"{module}.generate_missing", lambda jobs: None)
    monkeypatch.setattr(f"{module}.run_all", lambda jobs, at_once, threads: first(jobs[0]))


def test_what_failed_is_said_whatever_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_text("no database")

    def first(job: Job) -> list[str]:
        write_run(job, [0.5])
        return ["the others failed"]

    fake_runs(monkeypatch, first)
    arguments = ("table=quick", "rows=[scene]", "agents=[bc]", f"paths.logs={tmp_path}", f"out={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"lacks 2 of 3 runs, .* the others failed; .*mlflow"):
        reproduce(compose_config(*arguments, config_name="reproduce"))
    assert len(read_results(tmp_path / "out" / "quick.jsonl")) == 1


def test_a_signal_leaves_the_table_of_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(job: Job) -> list[str]:
        write_run(job, [0.5])
        raise Stopped(signal.SIGTERM)

    fake_runs(monkeypatch, first)
    arguments = ("table=quick", "rows=[scene]", "agents=[bc]", "mlflow=null", f"paths.logs={tmp_path}")
    with pytest.raises(Stopped, match="stopped by SIGTERM: go on by the same command"):
        reproduce(compose_config(*arguments, f"out={tmp_path / 'out'}", config_name="reproduce"))
    assert "| scene task 1 | bc | 1 |" in (tmp_path / "out" / "quick.md").read_text()


@pytest.mark.slow
def test_a_killed_reproduction_goes_on(tiny_data: Callable[[str, str], Path], tmp_path: Path) -> None:
    data = as_if_generated("cube-single-play-v0", tiny_data("cube-single", "play"), tmp_path / "data")
    settings = {"updates": 1500, "eval.every": 500, "eval.episodes": 1, "eval.num_envs": 1, "checkpoint_every": 100}
    settings |= {"validate_every": 1500, "diversity.states": 0, "networks.hidden": "[8]", "data.batch_size": 16}
    overrides = ["table=quick", "rows=[cube-single]", "agents=[bc]", "seeds=1", f"out={tmp_path / 'out'}"]
    overrides += [f"paths.data={data}", f"paths.logs={tmp_path}"]
    overrides += [f"+settings.{name}={value}" for name, value in settings.items()]
    run = tmp_path / "reproduce" / "quick" / "cube-single" / "bc" / "seed_0"
    command = start("reproduce.py", *overrides)
    command.wait_for((run / "checkpoints" / "0_joint" / "last.ckpt").exists)
    command.send_signal(signal.SIGKILL)
    command.wait()
    again = run_command("reproduce.py", *overrides)
    assert again.returncode == 0, again.stderr
    assert "going on: bc on cube-single, seed 0" in again.stdout + again.stderr
    (result,) = read_results(tmp_path / "out" / "quick.jsonl")
    assert result.identity["generated"] is False  # its file does not say so
    assert (tmp_path / "out" / "quick_curves.png").stat().st_size > 5000
    assert "| cube-single | bc | 1 |" in (tmp_path / "out" / "quick.md").read_text()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    ((whole, inside),) = _tables_in(client)
    assert whole.data.metrics == {"cube-single/bc": pytest.approx(result.value)}
    assert {file.path for file in client.list_artifacts(whole.info.run_id)} >= {"quick.html", "quick.jsonl", "quick.md"}
    (inside,) = inside
    assert inside.data.tags["commit"] == str(result.commit)
    assert [point.step for point in client.get_metric_history(inside.info.run_id, "evaluation")] == [500, 1000, 1500]


def _tables_in(client: MlflowClient) -> list[tuple[Run, list[Run]]]:
    """The runs of tables, each with the runs inside it."""
    experiment = client.get_experiment_by_name("reproduce").experiment_id
    found = client.search_runs([experiment])
    inside = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in found}
    return [
        (run, [other for other in found if inside[other.info.run_id] == run.info.run_id])
        for run in found
        if inside[run.info.run_id] is None
    ]


def test_a_table_is_logged_once(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "quick", rows=["scene"], agents=["bc"])
    for job in jobs:
        write_run(job, [0.25 + 0.5 * job.seed])
    (tmp_path / "quick.md").touch()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for count in (1, 1, 2):  # a second run came later
        results = [result_of(job) for job in jobs[:count]]
        track(uri, "quick", cells_of("quick", results), results, [tmp_path / "quick.md"])
    client = MlflowClient(uri)
    ((whole, inside),) = _tables_in(client)
    assert whole.data.metrics == {"scene task 1/bc": 50.0}
    assert sorted(run.data.metrics["value"] for run in inside) == [25.0, 75.0]
    for run in inside:
        assert len(client.get_metric_history(run.info.run_id, "evaluation")) == 1


def test_the_page_has_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    jobs = jobs_of(tmp_path, seeds=2, rows=["cube-single"], agents=["fql", "bc"], tasks=[1, 2])
    for job in jobs:
        write_run(job, [0.2, 0.9 + 0.05 * job.seed])
    (jobs[0].folder / "report.png").touch()
    results = [result_of(job) for job in jobs]
    cells = cells_of("ogbench_state", results)
    text = page("<b>a table</b>", cells, results, tmp_path / "out")
    own, _, _ = text.partition("<script>")
    assert "&lt;b&gt;a table&lt;/b&gt;" in own
    assert "://" not in own.replace(shlex.quote(str(tmp_path)), "")
    assert own.count("<tr>") == 2 + len(cells) + len(results)
    (link,) = re.findall(r'href="([^"]+report.png)"', own)
    assert (tmp_path / "out" / link).resolve() == jobs[0].folder / "report.png"
    plots = json.loads(text.rpartition("const plots = ")[2].partition(";\n")[0])
    profile = "Performance profile (too few seeds for a band)"
    assert [plot["title"] for plot in plots] == ["cube-single task 1", "cube-single task 2", profile]
    assert plots[0]["traces"][1]["y"] == pytest.approx([20, 92.5])


# Tables of one's own.


def write_table(path: Path, **changed: Any) -> Path:
    table = {
        "folder": "mine",
        "value": "last",
        "seeds": 5,
        "every": ["task=scene"],
        "rows": {"first": {"settings": ["task_id=1"]}, "second": {"task": 2, "settings": ["task_id=2"]}},
        "columns": {"one step": ["agent=fql"], "five": ["agent=fql", "data.n_step=5"]},
    }
    path.write_text(json.dumps({key: value for key, value in (table | changed).items() if value is not None}))
    return path


def test_a_table_of_ones_own_is_a_file(tmp_path: Path) -> None:
    mine = write_table(tmp_path / "steps.yaml")
    jobs = jobs_of(tmp_path, str(mine), agents=["five"])
    assert [(job.row, job.task, job.agent, job.seed) for job in jobs] == [
        *(("first", None, "five", 0), ("second", 2, "five", 0)),
        *(("first", None, "five", 1), ("second", 2, "five", 1)),
    ]
    assert jobs[1].folder == tmp_path / "logs" / "mine" / "second-task2" / "five" / "seed_0"
    its_own = ("task=scene", "task_id=2", "agent=fql", "data.n_step=5")
    assert jobs[1].settings == (*its_own, f"paths.data={tmp_path / 'data'}", "seed=0", "logger=csv")
    for job in (jobs[0], jobs_of(tmp_path, str(mine), rows=["first"])[0]):
        write_run(job, [0.5, 0.75], n_step=5 if job.agent == "five" else 1)
        assert result_of(job).value == 75
    results = [result_of(job) for job in jobs_of(tmp_path, str(mine), rows=["first"], seeds=1)]
    refuse_mixture(results)  # what columns differ in is the method
    assert {cell.reason for cell in cells_of("steps", results)} == {"a table of its own"}


@pytest.mark.parametrize(
    "changed,says",
    [
        ({"value": "best"}, "value must be mean_of_last_three or last or before_and_after, got 'best'"),
        ({"columns": None}, "the setting 'columns' is missing"),
        ({"values": "last"}, "no setting 'values': did you mean 'value'?"),
        ({"columns": {"a/b": []}}, "'a/b' becomes a folder's name: take letters"),
        ({"columns": {"a,b": []}}, "'a,b' becomes a folder's name"),  # two of Hydra's jobs
        ({"columns": {"${a}": []}}, "'${a}' becomes a folder's name"),
        (
            {"rows": {"a": {"settings": [], "task": 1}, "a-task1": {"settings": []}}},
            "two rows have one folder, a-task1",
        ),
        ({"folder": "../mine"}, "'../mine' becomes a folder's name"),
        ({"rows": {"a": {"settings": [], "data": "scene-play-v0"}}}, "rows with data need generate"),
        ({"rows": {"a": {"settings": [], "task": 7}}}, "rows.a.task must be a whole number from 1 to 5, got 7"),
    ],
)
def test_a_file_that_is_no_table_says_why(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        layout(str(write_table(tmp_path / "mine.yaml", **changed)))
    with pytest.raises(UserError, match="there is no table"):
        layout(str(tmp_path / "other.yaml"))


def test_what_is_published_is_not_ones_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is a table ogbench_state already"):
        layout(str(write_table(tmp_path / "ogbench_state.yaml")))


def test_columns_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text(
        "{folder: a, value: last, seeds: 1, every: [], rows: {r: {settings: []}}, columns: {1: [], 5: [data.n_step=5]}}"
    )
    found: list[Job] = [*jobs_of(tmp_path, str(tmp_path / "steps.yaml"), seeds=1)]
    assert [job.folder.parent.name for job in found] == ["1", "5"]
    assert jobs_of(tmp_path, str(tmp_path / "steps.yaml"), seeds=1, agents=[5]) == found[1:]  # as YAML reads agents=[5]


def test_a_mean_over_tasks_is_that_of_the_seeds_that_all_have(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, seeds=4, rows=["cube-single"], agents=["fql"])
    for job in jobs:
        if job.task == 1 or job.seed in (1, 2):
            write_run(job, [{0: 0.0, 1: 0.5, 2: 0.7, 3: 1.0}[job.seed] if job.task == 1 else 0.1 * job.seed])
    *_, whole = cells_of("ogbench_state", [result_of(job) for job in jobs if job.state == "done"])
    assert (whole.task, whole.seeds) == (None, 2)
    assert whole.mean == pytest.approx((50 + 4 * 10 + 70 + 4 * 20) / 10)
    assert whole.interval is not None
    assert whole.interval[0] < whole.mean < whole.interval[1]


def test_a_mistake_is_said_before_the_first_run(tmp_path: Path) -> None:
    arguments = ("table=quick", "rows=[scene]", "agents=[bc]", f"paths.logs={tmp_path}")
    with pytest.raises(UserError, match="bc on scene task 1, seed 0: updates must be a whole number of at least 1"):
        reproduce(compose_config(*arguments, "+settings.updates=-5", config_name="reproduce"))
    for setting, said in {
        "trainer=nosuch": "unknown trainer 'nosuch': choose one of",
        "agent.critic.member=2": "no setting 'agent.critic.member': did you mean 'agent.critic.members'?",
    }.items():
        done = run_command("reproduce.py", *arguments, "agents=[fql]", f"+settings.{setting}")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: fql on scene task 1, seed 0: {said}")
    assert not list(tmp_path.rglob("seed_0*"))


def test_a_table_needs_an_environment(tmp_path: Path) -> None:
    rows = {"robot": {"settings": ["experiment=custom", f"data.source.path={tmp_path / 'robot.npz'}"]}}
    mine = write_table(tmp_path / "mine.yaml", every=[], rows=rows, columns={"a": ["agent=bc"]})
    config = compose_config(f"table={mine}", f"paths.logs={tmp_path}", config_name="reproduce")
    with pytest.raises(UserError, match="a on robot, seed 0: its data have no environment"):
        reproduce(config)


def test_returns_are_what_an_environment_without_success_has(tmp_path: Path) -> None:
    (job, *_) = jobs_of(tmp_path, str(write_table(tmp_path / "mine.yaml")), rows=["first"])
    write_run(job, [0.0], **{"eval/success": None, "eval/return": {"last": -12.5}})
    summary = json.loads((job.folder / "summary.json").read_text())
    del summary["eval/success"]
    (job.folder / "summary.json").write_text(json.dumps(summary))
    (job.folder / "metrics.csv").write_text("step,eval/return\n1000,-12.5\n")
    result = result_of(job)
    assert (result.measure, result.value, result.curve) == ("return", -12.5, {1000: -12.5})
    (cell,) = cells_of("mine", [result])
    assert cell.interval is None  # of one run nothing is known


def test_how_a_run_is_made_may_change(tmp_path: Path) -> None:
    chosen = {"rows": ["scene"], "agents": ["fql"], "tasks": [1], "seeds": 1}
    (job,) = jobs_of(tmp_path, **chosen)
    write_run(job, [0.5])
    (now,) = jobs_of(tmp_path, settings=["+compile=true", "trainer=gpu"], **chosen)
    refuse_other_settings([now])
    assert result_of(now).command == "python train.py " + shlex.join(job.settings)
    assert is_technical("+trainer.devices=2")
    assert not is_technical("trainer.precision=bf16-mixed")
    assert not is_technical("pathsX=1")


# What it comes to.


def test_a_cell_is_held_against_the_published_one(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, seeds=3, rows=["cube-single"], agents=["fql", "bc"], tasks=[1, 2])
    for job in jobs:
        success = {"fql": 0.95 + 0.02 * job.seed, "bc": 0.5}[job.agent]
        write_run(job, [0.0, success, success, success])
    results = [result_of(job) for job in jobs]
    cells = {(cell.task, cell.agent): cell for cell in cells_of("ogbench_state", results)}
    assert set(cells) == {(task, agent) for task in (1, 2, None) for agent in ("fql", "bc")}
    whole = cells[None, "fql"]
    assert (whole.mean, whole.seeds, whole.verdict) == (pytest.approx(97.0), 3, None)
    assert whole.reason == "the published mean is over more tasks"
    assert whole.deviation == pytest.approx(np.std([95, 97, 99]))
    assert cells[2, "bc"].verdict == "above"
    assert cells[2, "bc"].interval is not None
    assert cells[2, "bc"].interval[0] < 50 < cells[2, "bc"].interval[1]  # seeds are equal: over episodes
    text = markdown("ogbench_state", list(cells.values()))
    assert "| cube-single task 2 | fql | 3 | 97 ± 2 | 92 to 100 | 97 | +0 | inside |" in text
    assert r"cube-single 2 & $97 \pm 2$ (97, $+0$) & $50 \pm 0$ (3, $+47$) \\" in latex(list(cells.values()))
    assert "| fql | 97 |" in summary(results)


def test_the_mean_of_all_tasks_is_held_against_the_published_one(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, seeds=2, rows=["cube-single"], agents=["fql"])
    for job in jobs:
        write_run(job, [0.9 + 0.05 * job.seed])
    *_, whole = cells_of("ogbench_state", [result_of(job) for job in jobs])
    assert (whole.task, whole.verdict) == (None, "inside")
    assert whole.published is not None
    assert whole.published.mean == 96


def test_one_task_is_not_the_mean_of_five(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, seeds=2, rows=["cube-single"], agents=["fql", "deflow"])
    for job in jobs:
        if job.agent == "fql" or job.task == 3:
            write_run(job, [0.9 + 0.05 * job.seed])
    results = [result_of(job) for job in jobs if job.state == "done"]
    cells = {cell.agent: cell for cell in cells_of("ogbench_state", results) if cell.task is None}
    assert cells["fql"].verdict == "inside"
    assert (cells["deflow"].verdict, cells["deflow"].reason) == (None, "the published mean is over more tasks")


@pytest.mark.parametrize("table,row", [("ogbench_state", "scene"), ("d4rl_antmaze", "antmaze-umaze-v2")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_zero_is_never_0_to_0(table: str, row: str, seeds: int, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, table, seeds=seeds, rows=[row], agents=["fql"])
    for job in jobs if seeds == 1 else jobs[1:]:  # one task has a seed less
        write_run(job, [0.0])
    results = [result_of(job) for job in jobs if job.state == "done"]
    assert cells_of(table, results)
    for cell in cells_of(table, results):
        assert cell.interval is not None
        assert cell.interval[1] > 0.5


def test_a_score_of_one_run_has_no_verdict(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, "d4rl_adroit", seeds=1, rows=["pen-human-v1"], agents=["fql"])
    write_run(job, [0.5], **{"eval/score": {"last": 53.0}})
    (job.folder / "metrics.csv").write_text("step,eval/score\n1000,53\n")
    (cell,) = cells_of("d4rl_adroit", [result_of(job)])
    assert (cell.mean, cell.interval, cell.verdict) == (53.0, None, None)


def test_what_is_learnt_from_scratch_has_no_before(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, "quick_online", seeds=1, rows=["scene"], agents=["rlpd"])
    write_run(job, [0.0, 0.4])
    summary = json.loads((job.folder / "summary.json").read_text())
    summary["eval/success"]["last_of_stage"] = {"online": 0.4}
    (job.folder / "summary.json").write_text(json.dumps(summary))
    cells = cells_of("quick_online", [result_of(job)])
    assert "| - → 40 |" in markdown("quick_online", cells)
    assert r"$- \to 40$" in latex(cells)
    summary["eval/success"]["last_of_stage"] = {"model": 0.1, "joint": 0.3, "online": 0.4}
    (job.folder / "summary.json").write_text(json.dumps(summary))
    assert result_of(job).before == 30


def test_one_seed_has_no_verdict_however_many_its_episodes(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, seeds=1, rows=["cube-single"], agents=["bc"], tasks=[2])
    write_run(job, [0.9])
    (cell,) = cells_of("ogbench_state", [result_of(job)])
    assert cell.verdict is None
    assert cell.interval is not None
    assert cell.interval[1] - cell.interval[0] < 20  # Wilson's
    text = markdown("ogbench_state", [cell])
    assert "| cube-single task 2 | bc | 1 | 90 | 79 to 96 | 3 | +87 | - |" in text
    assert "No verdict: one seed says nothing of the spread over seeds" in text


def test_agents_are_compared_over_the_same_seeds_of_the_same_tasks(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "quick", seeds=6, agents=["bc", "iql"])
    for job in jobs:
        easy = job.row == "cube-single"
        if (job.agent, easy) != ("bc", False) or job.seed < 2:  # not all of its hard runs are done yet
            write_run(job, [0.9 if easy else 0.1 + 0.01 * job.seed])
    done = [result_of(job) for job in jobs if job.state == "done"]
    text = summary(done)
    assert "| bc | 50 | - | - | 0.50 |" in text
    assert "| iql | 50 | - | 0.50 | - |" in text
    assert "over 2 tasks and the seeds that every agent has of them all (0, 1)" in text
    assert profile_title(done) == "Performance profile (too few seeds for a band)"
    assert all(curve.low == curve.mean == curve.high for curve in profiles(done))
    (bc, iql) = summary([result for result in done if result.row == "cube-single"]).splitlines()[2:4]
    assert (bc, iql) == ("| bc | 90 | - | - | 0.50 |", "| iql | 90 | - | 0.50 | - |")  # the same in every draw
    of_iql = [replace(result, agent=f"iql{n}") for n in (1, 2) for result in done if result.agent == "iql"]
    assert re.search(r"\| iql1 \| \d+ \| \d+ to \d+ \| - \| 0.50 \(0.3\d to 0.6\d\)", summary(of_iql))


def test_a_run_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    chosen = {"rows": ["scene"], "agents": ["fql"], "tasks": [1], "seeds": 1}
    (job,) = jobs_of(tmp_path, **chosen)
    write_run(job, [0.5])
    refuse_other_settings([job])
    with pytest.raises(UserError, match=r"was begun with other settings \(agent.alpha=3\)"):
        refuse_other_settings(jobs_of(tmp_path, settings=["agent.alpha=3"], **chosen))


def test_a_run_begun_by_hand_is_taken_for_what_it_is(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    saved = plain(load_config(finished_run() / "config.yaml"))
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    path = {"data": saved["data"] | {"source": saved["data"]["source"] | {"path": "/elsewhere"}}}
    refuse_other_configuration(job, saved, saved | {"threads": 7, "video": {"episodes": 3}})
    refuse_other_configuration(job, saved, saved | {"agent": saved["agent"] | {"trust_region": "auto"}})
    for changed, named in (({"tau": 0.5}, f"tau={saved['tau']}"), (path, "data.source.path=")):
        with pytest.raises(UserError, match=rf"was begun with other settings \({named}"):
            refuse_other_configuration(job, saved, saved | changed)


def configurations(*overrides: str, settings: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """That of a run with these overrides, and that of the plan."""
    planned = ("agent=fql", "task=cube_single", "stages=joint", *settings)
    return plain(compose_config(*planned, *overrides)), plain(compose_config(*planned))


@pytest.mark.parametrize(
    "overrides,named",
    [
        (["agent.actor.alpha=7"], "agent.actor.alpha=7"),
        (["networks.hidden=[8]"], r"agent.critic.hidden=\[8\]"),
        (["stages=staged", "stages.behavior.steps=45_000"], "stages.behavior"),
        (["+stages.joint.lr=1e-2"], "stages.joint.lr=0.01"),
        (["+agent.optimizer.parts.critic.lr=1e-2"], "agent.optimizer.parts.critic.lr=0.01"),
    ],
)
def test_a_run_whose_configuration_is_another_is_not_taken(overrides: list[str], named: str, tmp_path: Path) -> None:
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    saved, planned = configurations(*overrides)
    with pytest.raises(UserError, match=rf"begun with other settings \(.*{named}"):
        refuse_other_configuration(job, saved, planned)
    of_the_group = "parts" in named  # which may be an option that only newer code has, with its default
    asked = replace(job, settings=("agent.optimizer.parts.critic.lr=0.01",)) if of_the_group else job
    with pytest.raises(UserError, match="begun with other settings"):
        refuse_other_configuration(asked, planned, saved)


def test_a_run_of_older_code_with_the_same_settings_is_taken(tmp_path: Path) -> None:
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    saved, planned = configurations(settings=("agent=deflow", "agent.trust_region=auto"))
    del saved["agent"]["critic"]["norm"], saved["agent"]["optimizer"]["clip"]
    saved["agent"]["optimizer"] |= {"_target_": "torch.optim.Adam", "_partial_": True}
    saved["agent"]["trust_region"] = {"delta": 0.1}
    saved["iav"]["result"] = {"delta": 0.1}
    refuse_other_configuration(job, saved, planned)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (("agent=fql", "agent.horizon=5", "agent.path=auto"), "path"),
        (("agent=fql", "agent/dynamics=flow", "agent.dynamics.statistics=auto"), "dynamics.statistics"),
    ],
)
def test_what_the_data_decided_of_a_run_is_what_the_plan_left_to_them(
    settings: tuple[str, ...], part: str, tmp_path: Path
) -> None:
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    job = replace(job, settings=settings)
    saved, planned = configurations(settings=settings)
    *groups, last = ["agent", *part.split(".")]
    reduce(getitem, groups, saved)[last] = {"mean": [0.1, 0.2], "std": [1.0, 2.0]}
    refuse_other_configuration(job, saved, planned)
    del reduce(getitem, groups, saved)[last]
    with pytest.raises(UserError, match=rf"no agent.{part}"):
        refuse_other_configuration(job, saved, planned)


def test_a_relative_path_is_the_one_that_the_run_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    job, saved = replace(job, dataset=None), {"data": {"source": {"path": str(tmp_path / "a.npz")}}}
    refuse_other_configuration(job, saved, {"data": {"source": {"path": "a.npz"}}})
    with pytest.raises(UserError, match="other settings"):
        refuse_other_configuration(job, saved, {"data": {"source": {"path": "b.npz"}}})


def test_what_is_tuned_since_is_said_by_the_command(tmp_path: Path) -> None:
    arguments = ("table=ogbench_state", "rows=[scene]", "agents=[fql]", "tasks=[1]", "seeds=2", "dry=true")
    command = compose_config(*arguments, f"paths.logs={tmp_path}", config_name="reproduce")
    logs = tmp_path / "reproduce"
    jobs = plan(
        layout("ogbench_state"), logs, Path(command.paths.data).expanduser(), 2, ["scene"], [1], ["fql"], settings=[]
    )
    for job in jobs:
        write_run(job, [0.5])
        alpha = () if job.seed == 0 else ("agent.actor.alpha=3",)
        OmegaConf.save(compose_config(*job.settings, *alpha), job.folder / "config.yaml", resolve=True)
    with pytest.raises(UserError, match=r"seed_1 was begun with other settings \(agent.actor.alpha=3\)"):
        reproduce(command)


def test_generated_data_never_lie_where_the_published_do(tmp_path: Path) -> None:
    (job, *_) = jobs_of(tmp_path, "quick", seeds=1)
    assert job.dataset is not None
    source = instantiate(compose_config("task=cube_single", f"paths.data={tmp_path / 'data'}").data.source)
    dataset = {"generate_episodes": job.dataset.episodes, "generate_seed": job.dataset.seed}
    for_quick = replace(source, **dataset, generate_if_missing=True)
    assert job.dataset.path == for_quick._generated
    assert job.dataset.path != source._downloaded


def test_data_that_have_moved_are_the_same_data(tmp_path: Path) -> None:
    (before, *_), (now, *_) = (plan(layout("quick"), tmp_path, tmp_path / at, 1) for at in ("a", "b"))
    write_run(now, [0.5])
    now.made_by.write_text("\n".join(before.settings))
    refuse_other_settings([now])
    now.made_by.write_text("\n".join(s.replace("-200ep-", "-300ep-") for s in before.settings))
    with pytest.raises(UserError, match="other settings"):
        refuse_other_settings([now])
    mine = write_table(tmp_path / "mine.yaml", every=["data.source.path=a.npz"])
    (before, *_) = jobs_of(tmp_path, str(mine), seeds=1)
    write_run(before, [0.5])
    write_table(mine, every=["data.source.path=b.npz"])
    with pytest.raises(UserError, match=r"data.source.path=a.npz data.source.path=b.npz"):
        refuse_other_settings(jobs_of(tmp_path, str(mine), seeds=1))


def test_published_data_lie_where_it_is_said(tmp_path: Path) -> None:
    assert f"paths.data={tmp_path / 'data'}" in jobs_of(tmp_path, "d4rl_antmaze", seeds=1)[0].settings


@pytest.mark.parametrize("name,content", [("summary.json", "{"), ("metrics.csv", None)])
def test_a_damaged_run_is_left_out_and_named(name: str, content: str | None, tmp_path: Path) -> None:
    whole, broken = jobs_of(tmp_path, seeds=2, rows=["scene"], agents=["fql"], tasks=[1])
    for job in (whole, broken):
        write_run(job, [0.5])
    path = broken.folder / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    if name == "summary.json":
        assert broken.state == "begun"  # `train.py` makes it anew
        return
    results, damaged = _done([whole, broken])
    assert [result.seed for result in results] == [0]
    assert len(damaged) == (content is None)


def test_online_shows_before_and_after(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "offline_to_online", rows=["puzzle-4x4"], agents=["fql"])
    for job in jobs:
        write_run(job, [0.08, 0.2, 0.4])
    (cell,) = cells_of("offline_to_online", [result_of(job) for job in jobs])
    assert (cell.before, cell.mean, cell.verdict) == (8.0, 40.0, "inside")
    assert "| 8 → 40 ± 0 | 31 to 50 | 8 → 38 |" in markdown("offline_to_online", [cell])


@pytest.mark.parametrize(
    "changed,why",
    [
        ({"data": {"name": "cube-single-play-v0", "generated": True}}, "generated here"),
        ({"data": {"name": "my-robot-v0", "generated": False}}, "its data are others"),
        ({"success_timing": "post"}, "read otherwise"),
        ({"horizon": 5}, "span several steps"),
        ({"transitions": {"train": 200_000}}, "fewer than OGBench's"),
        ({"protocol": "Minari data and environment"}, "Minari"),
    ],
)
def test_two_protocols_never_meet(changed: dict[str, Any], why: str, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, rows=["cube-single"], agents=["fql"], tasks=[2])
    write_run(jobs[0], [0.9])
    write_run(jobs[1], [0.9], **changed)
    results = [result_of(job) for job in jobs]
    assert why_not_published("ogbench_state", results[0]) is None
    assert why in str(why_not_published("ogbench_state", results[1]))
    (cell,) = cells_of("ogbench_state", results[1:])
    assert (cell.verdict, cell.published) == (None, None)
    assert why in markdown("ogbench_state", [cell])
    with pytest.raises(UserError, match="cannot stand in one table"):
        refuse_mixture(results)


def test_an_online_row_of_ogbench_needs_as_many_data(tmp_path: Path) -> None:
    few = {"transitions": {"train": 1000}}
    for row, why in (("puzzle-4x4", "its data are fewer than OGBench's"), ("pen-cloned-v1", None)):
        (job,) = jobs_of(tmp_path, "offline_to_online", seeds=1, rows=[row], agents=["fql"])
        write_run(job, [0.5], **few, protocol="OGBench single-task" if row == "puzzle-4x4" else "D4RL")
        assert why_not_published("offline_to_online", result_of(job)) == why


def test_changed_settings_are_another_protocol(tmp_path: Path) -> None:
    settings = ["+trainer.devices=1", "compile=true", "updates=20", "agent.critic.members=3"]
    (job,) = jobs_of(tmp_path, seeds=1, rows=["scene"], agents=["fql"], tasks=[1], settings=settings)
    write_run(job, [0.9])
    result = result_of(job)
    assert result.identity["changed"] == ["agent.critic.members=3", "updates=20"]
    assert why_not_published("ogbench_state", result) == "its settings are others (agent.critic.members=3 updates=20)"


def test_two_versions_are_compared_cell_by_cell(tmp_path: Path) -> None:
    files = []
    for name, success in (("a", 0.5), ("b", 0.75)):
        jobs = jobs_of(tmp_path / name, rows=["scene"], agents=["fql"], tasks=[1])
        for job in jobs:
            write_run(job, [success + 0.1 * job.seed])
        files.append(tmp_path / f"{name}.jsonl")
        write_results(files[-1], [result_of(job) for job in jobs])
    a, b = map(read_results, files)
    assert "| scene task 1 | fql | 55 ± 5 (2) | 80 ± 5 (2) | +25.0 | -5.4 to +55.4 | 1.00 |" in compare(a, b)
    assert "Other settings" not in compare(a, b)  # but for the seeds and the folders
    jobs = jobs_of(tmp_path / "c", rows=["scene"], agents=["fql"], tasks=[1], settings=["tau=0.01", "threads=2"])
    for job in jobs:
        write_run(job, [0.5])
    slower = [result_of(job) for job in jobs]
    assert "\n- **Other settings** in scene task 1, fql: B alone has tau=0.01.\n" in compare(a, slower)
    last = [replace(result, command=f"{result.command} ++tau=0.02") for result in slower]  # the one that holds
    assert "fql: A alone has tau=0.01; B alone has tau=0.02." in compare(slower, last)
    same = [replace(result, command=result.command.replace("tau=0.01", "tau=1e-2")) for result in slower]
    assert "Other settings" not in compare(slower, same)
    assert (
        "fql: tau=0.01 in 2 of 2 runs of A and 1 of 2 of B; tau=0.02 in 0 of 2 runs of A and 1 of 2 of B."
        in compare(slower, [slower[0], last[1]])
    )
    line = json.loads(files[0].read_text().splitlines()[0])
    line["identity"]["generated"] = True
    files[0].write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="another protocol in the two files: generated differs"):
        compare(read_results(files[0]), b)
    with pytest.raises(UserError, match="there is no results file"):
        read_results(tmp_path / "none.jsonl")
    files[0].write_text(json.dumps(line | {"command": "python train.py 'task=scene"}) + "\n")
    with pytest.raises(UserError, match=r"is no results file.*No closing quotation"):
        read_results(files[0])
    files[0].write_text("nothing\n")
    with pytest.raises(UserError, match="is no results file"):
        read_results(files[0])


def test_two_protocols_are_not_compared(tmp_path: Path) -> None:
    def results(name: str, table: str, **changed: Any) -> list[Result]:
        (job,) = jobs_of(tmp_path / name, table, seeds=1, rows=["cube-single"], agents=["fql"])
        write_run(job, [0.5, 0.9], **changed)
        return [result_of(job)]

    offline = results("a", "quick")
    with pytest.raises(UserError, match="value differs"):
        compare(offline, results("b", "quick_online"))
    with pytest.raises(UserError, match="stages differs"):
        compare(offline, results("c", "quick", stages={"joint": 300}))
    write_results(tmp_path / "broken.jsonl", [replace(offline[0], identity=None)])
    with pytest.raises(UserError, match="a line has no identity"):
        read_results(tmp_path / "broken.jsonl")


def test_several_versions_of_the_code_are_named(tmp_path: Path) -> None:
    first, second = jobs_of(tmp_path, "quick", rows=["scene"], agents=["bc"])
    write_run(first, [0.5])
    write_run(second, [0.5])
    _write("quick", [result_of(first), result_of(second)], tmp_path)
    assert "versions of the code" not in (tmp_path / "quick.md").read_text()
    shutil.rmtree(second.folder)
    write_run(second, [0.5], commit="0123456789-dirty", commits=["abc", "0123456789-dirty"])
    _write("quick", [result_of(first), result_of(second)], tmp_path)
    for name in ("quick.md", "quick.tex"):
        assert "has had a part in: abc (2), 0123456-dirty (1)." in (tmp_path / name).read_text()
    old = {key: value for key, value in json.loads(_lines(tmp_path)[0]).items() if key != "commits"}
    (tmp_path / "quick.jsonl").write_text(json.dumps(old))
    assert read_results(tmp_path / "quick.jsonl")[0].commit == "abc"  # a line that older code wrote


def _lines(folder: Path) -> list[str]:
    return (folder / "quick.jsonl").read_text().splitlines()


def test_agents_without_a_task_in_common_have_a_table_all_the_same(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "quick", seeds=1, agents=["bc", "iql"])
    for job in jobs:
        if (job.row, job.agent) in {("cube-single", "bc"), ("scene", "iql")}:
            write_run(job, [0.5])
    results, _ = _done(jobs)
    assert not poolable(results)
    (tmp_path / "quick_profile.png").touch()  # of an earlier selection
    _write("quick", results, tmp_path)
    assert len(read_results(tmp_path / "quick.jsonl")) == 2
    assert not (tmp_path / "quick_profile.png").exists()


def test_a_page_that_cannot_be_made_again_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(tmp_path, "quick", seeds=1, rows=["scene"], agents=["bc"])
    write_run(job, [0.5])
    (tmp_path / "quick.html").touch()
    monkeypatch.setattr("deflow.reproduction.reproduce.is_possible", lambda: False)
    _write("quick", [result_of(job)], tmp_path)
    assert not (tmp_path / "quick.html").exists()


def test_two_commands_do_not_write_one_table_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(tmp_path, "quick", seeds=1, rows=["scene"], agents=["bc"])
    write_run(job, [0.5])
    lock = FileLock(tmp_path / ".quick.lock")

    def taken(path: Path, results: Sequence[Result]) -> None:
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
        write_results(path, results)

    monkeypatch.setattr("deflow.reproduction.reproduce.write_results", taken)
    _write("quick", [result_of(job)], tmp_path)
    lock.acquire(timeout=0)


def test_returns_of_two_tasks_have_no_mean_in_common(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "quick", seeds=2, agents=["bc", "iql"])
    for job in jobs:
        write_run(job, [0.5])
    shares = [result_of(job) for job in jobs]
    returns = [replace(result, measure="return", value=-500.0 - result.seed) for result in shares]
    assert summary(returns) == ""
    assert "IQM" in summary(shares)
    of_one = [result for result in returns if result.row == "scene"]
    assert "-50" in summary(of_one)
    (profile, _) = profiles(of_one)
    assert profile.x[0] == -501.0
    assert (profile.mean[0], profile.mean[-1]) == (0.5, 0.0)


def test_the_average_is_held_against_the_published_one(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "d4rl_antmaze", seeds=2, agents=["deflow", "fql"])
    for job in jobs:
        if job.agent == "deflow" or job.row != "antmaze-umaze-v2":
            write_run(job, [0.8 + 0.06 * job.seed], protocol="D4RL")
    found = {
        (cell.row, cell.agent): cell
        for cell in cells_of("d4rl_antmaze", [result_of(j) for j in jobs if j.state == "done"])
    }
    average = found["average", "deflow"]
    assert (average.mean, average.verdict, average.seeds) == (pytest.approx(83), "inside", 2)
    assert average.published is not None
    assert average.published.value == 83
    assert ("average", "fql") not in found


def test_a_score_of_antmaze_is_a_share(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "d4rl_antmaze", seeds=3, rows=["antmaze-large-play-v2"], agents=["cac"])
    for job in jobs:
        write_run(job, [0.0], **{"eval/score": {"last": 0.0}}, protocol="D4RL")
        (job.folder / "metrics.csv").write_text("step,eval/score\n1000,0\n")
    (cell,) = cells_of("d4rl_antmaze", [result_of(job) for job in jobs])
    assert (cell.mean, cell.verdict) == (0.0, "inside")
    assert cell.interval is not None
    assert cell.interval[1] > 0.5


def test_the_ends_of_an_interval_read_apart(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, seeds=8, rows=["antmaze-giant"], agents=["bc"])
    for job in jobs:
        write_run(job, [0.0])
    text = markdown("ogbench_state", cells_of("ogbench_state", [result_of(job) for job in jobs]))
    assert "| antmaze-giant | bc | 8 | 0 ± 0 | 0.0 to 0.2 |" in text
    assert "0 to 0 " not in text


def test_seeds_that_tasks_do_not_share_are_not_paired(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, seeds=4, rows=["scene"], agents=["fql"], tasks=[1, 2])
    for job in jobs:
        if (job.task == 1) == (job.seed < 2):
            write_run(job, [0.5 + 0.1 * job.seed])
    *_, whole = cells_of("ogbench_state", [result_of(job) for job in jobs if job.state == "done"])
    assert (whole.mean, whole.deviation, whole.interval) == (pytest.approx(65), None, None)


def test_honest_runs_differ_by_what_was_measured() -> None:
    assert tolerance("cube-single", "iql") == pytest.approx(83 - 50.1)
    assert 1 < tolerance("cube-single", "srpo") < 10  # was not run again: the median of those that were


def test_nothing_to_do_is_said() -> None:
    with pytest.raises(UserError, match="name a table"):
        reproduce(compose_config(config_name="reproduce"))
    with pytest.raises(UserError, match="takes two results files"):
        reproduce(compose_config("compare=[a.jsonl]", config_name="reproduce"))
