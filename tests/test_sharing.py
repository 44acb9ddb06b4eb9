"""What is shared acts as the checkpoint from wherever it is loaded, says of itself what is so, and runs no code."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import constants

import deflow
from deflow.checkpoints import load_checkpoint
from deflow.errors import UserError
from deflow.evaluating import evaluate
from deflow.exporting import export
from deflow.inspection import inspect
from deflow.preparation import prepare
from deflow.sharing import registry
from deflow.sharing.address import CARD, POLICY, HubAddress, RegistryAddress, is_address, parse
from deflow.sharing.private import without_places, without_private
from deflow.sharing.push import _is_result, push
from tests.commands import run as run_command
from tests.commands import tiny_overrides
from tests.conftest import CKPT, compose_config, tiny_config
from tests.hub import TOKEN, Hub, running_hub

FILES = {CARD, POLICY, "report.png"}
TO = "hf://someone/maze"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, in the place of the real one, with someone logged in and an empty cache."""
    with running_hub() as hub:
        ask(hub.url, monkeypatch, tmp_path)
        yield hub


def ask(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let this process ask for the hub at `url`; the library reads its variables when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, of the hub's own storage
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def share(run: Path, *overrides: str) -> str:
    return push(compose_config(f"ckpt='{run}'", *overrides, config_name="push"))


def actions(policy: Any) -> np.ndarray:
    policy.reset(seed=3)
    return policy.act(np.random.default_rng(0).normal(size=(20, policy.spec.observation_dim)).astype(np.float32))


def card(text: bytes) -> tuple[dict[str, Any], str]:
    """What the hub reads of a card, and what people do."""
    _, front, body = text.decode().split("---\n", 2)
    return yaml.safe_load(front), body


# The hub.


def test_shared_on_the_hub_and_loaded_again(trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    there = share(trained, f"to={TO}")
    (repository,) = hub.repositories.values()
    assert {*repository.files("main")} == FILES | {".gitattributes"}
    assert len(repository.commits) == 2  # that of the new repository, and one with all files
    assert there == f"{TO}@{repository.branches['main']}"
    assert there in capsys.readouterr().out
    expected = actions(deflow.load(trained))
    for address in (TO, there, f"{TO}@main"):
        assert np.array_equal(actions(deflow.load(address)), expected)
    first = hub.asked.index("POST /api/repos/create")
    assert all(asked.startswith("GET ") for asked in hub.asked[:first])
    read = {asked.rpartition("/")[2] for asked in hub.asked if "/resolve/" in asked}
    assert read == {POLICY}  # and no other file


def test_a_revision_is_a_branch_that_is_made(trained: Path, hub: Hub) -> None:
    hub.add("someone/maze", {CARD: b"old", POLICY: b"old"})
    for _ in range(2):
        share(trained, f"to={TO}@tuned")
    files = hub.repositories["someone/maze"].files
    assert files("main")[POLICY] == b"old"
    assert np.array_equal(actions(deflow.load(f"{TO}@tuned")), actions(deflow.load(trained)))
    with pytest.raises(UserError, match=f"^cannot read {TO}: it is not a whole checkpoint$"):
        deflow.load(TO)
    with pytest.raises(UserError, match=r"^someone/maze has no revision older$"):
        deflow.load(f"{TO}@older")


def test_no_picture_of_another_policy_stays(trained: Path, hub: Hub, tmp_path: Path) -> None:
    alone = Path(shutil.copy(trained / CKPT, tmp_path / "alone.ckpt"))
    for place in (f"to={TO}", f"to={TO}@tuned"):
        share(trained, place)
        share(alone, place)
    repository = hub.repositories["someone/maze"]
    assert {*repository.files("main")} == {*repository.files("tuned")} == {CARD, POLICY, ".gitattributes"}
    for run in (trained, alone):
        share(run, f"to={TO}", "dry=true", f"out={tmp_path / 'out'}", "overwrite=true")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CARD, POLICY}


def test_a_branch_of_somebody_elses_repository_is_refused(trained: Path, hub: Hub) -> None:
    hub.add("someone/maze", {CARD: b"of something else", "model.bin": b""})
    with pytest.raises(UserError, match=r"holds something else, whose README.md would be replaced"):
        share(trained, f"to={TO}@new")


def test_private_repositories(trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    share(trained, f"to={TO}", "private=true")
    assert hub.repositories["someone/maze"].private
    deflow.load(TO)
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(
        UserError, match=r"^no someone/maze at http.*, or it is private: correct the name, or log in by"
    ):
        deflow.load(TO)


@pytest.mark.parametrize(
    ("address", "files", "says"),
    [
        ("hf://someone/nothing", {}, "^no someone/nothing at http.*, or it is private"),
        (TO, {"model.safetensors": b"", "model.pkl": b""}, f"^{TO} holds no {POLICY}: it is nothing that push.py has"),
        (TO, {POLICY: b"\x80\x04K\x01."}, f"^cannot read {TO}: it is not a whole checkpoint$"),
        (TO, {POLICY: safetensors.torch.save({})}, f"^{TO} is a checkpoint of something else"),
    ],
)
def test_what_cannot_be_loaded(address: str, files: dict[str, bytes], says: str, hub: Hub) -> None:
    hub.add("someone/maze", files)
    with pytest.raises(UserError, match=says) as raised:
        deflow.load(address)
    assert "\n" not in str(raised.value)


def test_what_is_shared_names_no_code_that_is_not_trusted(trained: Path, hub: Hub, tmp_path: Path) -> None:
    share(trained, f"to={TO}")
    file = hub.repositories["someone/maze"].files("main")
    (tmp_path / POLICY).write_bytes(file[POLICY])
    with safetensors.safe_open(tmp_path / POLICY, "pt") as opened:
        about = json.loads(opened.metadata()["deflow"])
    about["config"]["agent"]["_target_"] = "os.system"
    weights = safetensors.torch.load(file[POLICY])
    hub.add("someone/evil", {POLICY: safetensors.torch.save(weights, {"deflow": json.dumps(about)})})
    with pytest.raises(UserError, match=r"^hf://someone/evil: agent names os\.system, which a file may not"):
        deflow.load("hf://someone/evil")


@pytest.mark.parametrize(
    ("variable", "to", "says"),
    [
        (None, TO, r"^nobody is logged in at http.*: log in by 'hf auth login', or set HF_TOKEN$"),
        ("hf_wrong", TO, r"^http.* does not take the token: log in by"),
        (TOKEN, "hf://another/maze", r"^the token may not do that with hf://another/maze: take one that may"),
        (TOKEN, "hf://someone/taken", r"^hf://someone/taken holds something else, whose README\.md would be replaced"),
        (TOKEN, "hf://someone/a--b", r"^hf://someone/a--b is no name that the hub takes"),
    ],
)
def test_what_keeps_one_from_sharing(
    variable: str | None, to: str, says: str, trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("someone/taken", {CARD: b"mine"})
    if variable is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", variable)
    with pytest.raises(UserError, match=says) as raised:
        share(trained, f"to={to}")
    assert "\n" not in str(raised.value)
    assert {*hub.repositories} == {"someone/taken"}
    assert len(hub.repositories["someone/taken"].commits) == 1


def test_without_a_network(
    trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    share(trained, f"to={TO}")
    expected = actions(deflow.load(TO))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library tries for half a minute
    ask("http://127.0.0.1:9", monkeypatch, tmp_path)
    assert np.array_equal(actions(deflow.load(TO)), expected)  # of the cache
    for what in (lambda: deflow.load("hf://someone/other"), lambda: share(trained, f"to={TO}")):
        with pytest.raises(UserError, match=r"^cannot reach http://127\.0\.0\.1:9 for hf://someone/"):
            what()
    assert not caplog.records  # of every try


def test_offline(trained: Path, hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    result = run_command("push.py", f"ckpt={trained}", f"to={TO}", environment=environment, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line == f"error: HF_HUB_OFFLINE is set, and {TO} is not to be had without the network"
    assert not hub.asked


def test_the_variables_of_the_hub_are_heeded(trained: Path, hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    result = run_command("push.py", f"ckpt={trained}", f"to={TO}", environment=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f'deflow.load("{TO}@' in result.stdout
    assert {*hub.repositories["someone/maze"].files("main")} >= FILES
    assert {*os.listdir(tmp_path)} <= {"home"}


def test_without_the_package(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for what in (lambda: deflow.load(TO), lambda: share(trained, f"to={TO}")):
        with pytest.raises(UserError, match=r"^hf:// needs the package huggingface_hub: pip install huggingface_hub$"):
            what()


@pytest.mark.usefixtures("short_episodes")
def test_every_ckpt_takes_an_address(
    trained: Path, hub: Hub, point_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share(trained, f"to={TO}")
    evaluate(compose_config(f"ckpt={TO}", "episodes=1", "num_envs=1", config_name="evaluate"))
    assert "1 episodes" in capsys.readouterr().out
    assert not list(Path(constants.HF_HUB_CACHE).rglob("evaluation.json"))
    out = tmp_path / "policy.safetensors"
    export(compose_config(f"ckpt={TO}", "format=torch", "episodes=0", f"out={out}", config_name="export"))
    assert np.array_equal(actions(deflow.load(out)), actions(deflow.load(trained)))
    with pytest.raises(UserError, match=f"^out: name a file, there is nothing beside {TO}$"):
        export(compose_config(f"ckpt={TO}", config_name="export"))
    started = prepare(tiny_config(point_data, "experiment=pointmaze", f"ckpt={TO}"), tmp_path / "run", resume=False)
    weights = load_checkpoint(trained / CKPT)["state_dict"]
    assert all(np.array_equal(weight, weights[name]) for name, weight in started.learner.state_dict().items())
    assert started.config.ckpt == TO
    data = ("task=pointmaze_medium", f"paths.data={point_data}", f"out={tmp_path}", "samples=2")
    assert "policy" in str(inspect(compose_config(*data, f"ckpt={TO}", config_name="inspect_data")))


# MLflow's registry.


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data base of MLflow's, with no model in it; everybody's, to be copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    registry.have_experiment(f"sqlite:///{path}", registry.EXPERIMENT, registry.SETTING)
    return path


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(database, tmp_path / 'mlflow.db')}"


def test_shared_in_the_registry_and_loaded_again(trained: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    for number in (1, 2):
        assert share(trained, "to=models:/maze", f"tracking_uri={uri}") == f"models:/maze/{number}"
    client = MlflowClient(uri, registry_uri=uri)
    first, second = sorted(client.search_model_versions("name = 'maze'"), key=lambda one: int(one.version))
    assert first.run_id != second.run_id
    assert {Path(one.path).name for one in client.list_artifacts(second.run_id, registry.FOLDER)} == FILES
    assert "# DeFlow on pointmaze" in second.description
    assert client.get_run(second.run_id).info.status == "FINISHED"
    expected = actions(deflow.load(trained))
    assert np.array_equal(actions(deflow.load("models:/maze/1", tracking_uri=uri)), expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert np.array_equal(actions(deflow.load("models:/maze/latest")), expected)

    for address, says in (
        ("models:/maze/3", "^maze has no version 3 in MLflow at sqlite:.*: the newest is 2$"),
        ("models:/other/1", "^MLflow at sqlite:.* has no model other$"),
        ("models:/maze", "^models:/maze has versions: say which, as in models:/maze/1 or models:/maze/latest$"),
    ):
        with pytest.raises(UserError, match=says):
            deflow.load(address)
    shutil.rmtree(second.source.removeprefix("file://"))
    with pytest.raises(UserError, match=rf"^models:/maze/2 holds no {POLICY} that can be read"):
        deflow.load("models:/maze/2")


def test_a_deleted_experiment_can_only_be_brought_back(trained: Path, uri: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(registry.EXPERIMENT)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    bring = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {experiment.experiment_id}"
    with pytest.raises(UserError, match=f"^MLflow's experiment 'shared' has been deleted: bring it back, {bring}$"):
        share(trained, "to=models:/maze", f"tracking_uri={uri}")


def test_a_version_that_is_not_made_leaves_no_run(trained: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def fails(*_: object, **__: object) -> None:
        raise MlflowException("no room\nat all")

    monkeypatch.setattr(MlflowClient, "create_model_version", fails)
    with pytest.raises(UserError, match=rf"^MLflow at {uri} fails \(no room\): mend it, or share it elsewhere$"):
        share(trained, "to=models:/maze", f"tracking_uri={uri}")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(registry.EXPERIMENT)
    assert experiment is not None
    assert not client.search_runs([experiment.experiment_id])


def test_nothing_is_made_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"^no data base of MLflow's at .*/logs/mlflow.db: correct MLFLOW_TRACKING_URI"):
        deflow.load("models:/maze/1")
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI must start with sqlite:/// or http, got file"):
        deflow.load("models:/maze/1", tracking_uri="file:///tmp")
    assert not os.listdir(tmp_path)


# The card, and what is looked at before anything goes out.


def test_what_would_be_shared_is_written_to_be_looked_at(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    config = run / "config.yaml"
    monkeypatch.setenv("HOME", "/home/someone")
    typed = "python train.py experiment=pointmaze paths.data=/home/someone/data"
    config.write_text(f"# begun by: {typed}\n{config.read_text()}")
    summary = json.loads((run / "summary.json").read_text())
    summary["eval/success"] |= {"last": 0.5, "last_interval_95": [0.25, 0.75], "mean_of_last_three": 0.625}
    summary |= {"commit": "0123abc", "data": summary["data"] | {"generated": True, "path": "/home/someone/d.npz"}}
    (run / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "out"
    share(run, f"to={TO}", "dry=true", f"out={out}")
    assert {path.name for path in out.iterdir()} == FILES
    front, body = card((out / CARD).read_bytes())
    (model,) = front["model-index"]
    assert model["results"][0]["metrics"] == [{"type": "success", "name": "success, last", "value": 0.5}]
    assert "| success | 0.50 | 0.25 to 0.75 | 0.62 |" in body
    assert f'policy = deflow.load("{TO}")' in body
    for said in (
        "task: pointmaze-medium-navigate-singletask-v0",
        "protocol: OGBench single-task",
        "GENERATED and not the published set",
        "updates: 6 (joint)",
        "seed: 0",
        "commit: 0123abc",
        "versions: deflow ",
    ):
        assert said in body, said
    assert "    python train.py experiment=pointmaze paths.data=...\n" in body
    assert "pip install '.[hub]'` in a clone" in body
    assert "deflow[" not in body  # PyPI's is another project
    assert "![" in body
    assert "/home/someone" not in body
    with pytest.raises(UserError, match=r"holds README.md, policy.safetensors, report.png: choose another out="):
        share(run, f"to={TO}", "dry=true", f"out={out}")


def test_a_card_claims_no_numbers_that_are_not_the_policys(trained: Path, tmp_path: Path) -> None:
    def shared(name: str, file: Path) -> str:
        share(file, f"to={TO}", "dry=true", f"out={tmp_path / name}")
        front, body = card((tmp_path / name / CARD).read_bytes())
        assert "model-index" not in front
        return body

    last = trained / CKPT.with_name("last.ckpt")
    assert last.exists()
    assert "Not known: the run's numbers are those of another checkpoint." in shared("last", last)
    alone = Path(shutil.copy(trained / CKPT, tmp_path / "alone.ckpt"))
    body = shared("alone", alone)
    assert "Not known: the policy was shared without its run's summary." in body
    assert "The command was not recorded" in body
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {CARD, POLICY}


def test_one_of_several_seeds(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    run = finished_run("seeds=2")
    with pytest.raises(UserError, match="holds several seeds: give run_seed"):
        share(run, f"to={TO}", "dry=true", f"out={tmp_path / 'out'}")
    share(run, f"to={TO}", "dry=true", f"out={tmp_path / 'out'}", "run_seed=1")
    _, body = card((tmp_path / "out" / CARD).read_bytes())
    last = json.loads((run / "summary.json").read_text())["eval/success"]["last_of_seed"]["1"]
    assert (
        f"They are of seeds 0 to 1 together; this policy is that of seed 1, whose last success was {last:.2f}." in body
    )
    assert "- seed: 1\n" in body


def test_a_damaged_summary_is_said(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is damaged: make it anew by resume="):
        share(run, f"to={TO}", "dry=true", f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_training_remembers_how_it_was_begun(point_data: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(point_data, tmp_path / "run", "diversity.states=0", "agent=fql")
    result = run_command("train.py", *overrides)
    assert result.returncode == 0, result.stderr
    first = (tmp_path / "run" / "config.yaml").read_text().splitlines()[0]
    assert first.startswith("# begun by: python train.py experiment=pointmaze ")
    assert "agent=fql" in first


LOGGER = "deflow.loggers.mlflow_logger"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/home/someone/x", "~/x"),
        ("/home/someone", "~"),
        ("/home/someones/x", "..."),
        ("/scratch/alice/x", "..."),
        ("~alice/x", "..."),
        ("sqlite:////scratch/alice/a.db", "..."),
        ("file:///scratch/alice", "..."),
        ("mine:/scratch/alice", "..."),
        ("http://someone:secret@host:5000/x", "http://host:5000/x"),
        ("http://u:p@ss@host", "http://host"),
        ("http://u:p/ss@host", "http://host"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x"),
        ("https://h/x#token", "https://h/x"),
        *(
            (same, same)
            for same in ("data/x.npz", "~/x", "D4RL/pen/human-v2", "https://h/x", "own_envs:Name-v0", 1, None)
        ),
    ],
)
def test_nobody_is_named(value: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = {"data": {"source": [{"path": value}]}, "logger": {"_target_": LOGGER}}
    assert without_private(config) == {"data": {"source": [{"path": told}]}, "logger": {"_target_": LOGGER}}


def test_what_no_loading_reads_is_not_shared() -> None:
    read = {"agent": {"horizon": 1}, "data": {"source": {"keys": {"observations": "/obs"}}}}
    unread = {"paths": {"logs": "alice"}, "ckpt": "alice.ckpt", "resume": None}
    logger = {"_target_": LOGGER, "tracking_uri": "sqlite:///alice.db"}
    told = without_private(read | unread | {"logger": logger})
    assert told == read | {"paths": {}, "ckpt": None, "resume": None, "logger": {"_target_": LOGGER}}


@pytest.mark.parametrize("format", ["shared", "exported"])
def test_no_file_names_anybody(format: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained / CKPT)
    config = checkpoint["deflow"]["config"]
    config["logger"] = {"_target_": LOGGER, "tracking_uri": "http://me:secret@host", "experiment": "x"}
    config["trainer"]["default_root_dir"] = "/scratch/alice/x"
    config["data"]["source"]["url"] = "https://h/x?X-Amz-Signature=abc"
    config["paths"] = {"logs": "/scratch/alice", "data": str(Path.home() / "data")}
    (tmp_path / CKPT).parent.mkdir(parents=True)
    torch.save(checkpoint, tmp_path / CKPT)
    if format == "shared":
        share(tmp_path, f"to={TO}", "dry=true", f"out={tmp_path}")
    else:
        out = f"out={tmp_path / POLICY}"
        export(compose_config(f"ckpt={tmp_path}", "format=torch", "episodes=0", out, config_name="export"))
    assert not re.search(rb"secret|alice|Amz|%b" % bytes(Path.home()), (tmp_path / POLICY).read_bytes())
    assert np.array_equal(actions(deflow.load(tmp_path / POLICY)), actions(deflow.load(trained)))


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("'data.source.path=/some where/x.npz' tau=0.1", "data.source.path=... tau=0.1"),
        ("data.source.path=alice.npz ckpt=alice.ckpt", "data.source.path=... ckpt=..."),
        ("+logger.tracking_uri=http://a:b@c +logger.entity=alice", "+logger.tracking_uri=... +logger.entity=..."),
        ("data.source.url=https://h/x?X-Amz-Signature=abc", "data.source.url=..."),
        ("+trainer.default_root_dir=/scratch/alice/x", "+trainer.default_root_dir=..."),
        ("'+data.source={path:/scratch/alice/r.npz}'", "+data.source=..."),
        ("'+data.source={path:~/r.npz}'", "+data.source=..."),
        (
            "a=[b,/scratch/alice] c=file:///alice d=//host/alice e=~alice/x /scratch/alice",
            "a=... c=... d=... e=... ...",
        ),
        ("'open=quote", None),
        (
            "~stages.behavior networks.hidden=[16,16] task=scene",
            "'~stages.behavior' 'networks.hidden=[16,16]' task=scene",
        ),
    ],
)
def test_a_command_does_not_tell_where_things_lie(typed: str, told: str | None) -> None:
    begun = "python train.py task=scene "
    assert without_places(f"{begun}{typed}") == ("" if told is None else f"{begun}{told}")


def test_numbers_of_an_earlier_stage_are_not_the_policys() -> None:
    config = {"stages": {"joint": {}, "online": {}}, "seed": 0}
    file = Path("checkpoints/1_online/final.ckpt")
    of = {"eval/return": {"last_of_stage": {"joint": 1.0}}}
    assert not _is_result(file, config, of)
    assert _is_result(file, config, {"eval/return": {"last_of_stage": {"joint": 1.0, "online": 2.0}}})
    with pytest.raises(UserError, match=r"run_seed chooses among the seeds in a run's folder, and hf://a/b is the"):
        deflow.load("hf://a/b", run_seed=7)


# Addresses.


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a-1/b.c_d@v1.0", HubAddress("a-1/b.c_d", "v1.0")),
        ("models:/maze", RegistryAddress("maze")),
        ("models:/maze/12", RegistryAddress("maze", "12")),
        ("models:/maze/latest", RegistryAddress("maze", "latest")),
    ],
)
def test_addresses(text: str, address: HubAddress | RegistryAddress) -> None:
    assert parse(text) == address
    assert str(address) == text
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    ["hf://a", "hf://a/b/c", "hf://a/b@", "hf://datasets/a/b", "models:/", "models:/m/0x", "models:/a'b/1", "logs"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(text)} is no address of a policy: hf://USER/NAME"):
        parse(text)


def test_what_cannot_be_pushed(trained: Path) -> None:
    with pytest.raises(UserError, match=r"^to=models:/maze/3: MLflow numbers the versions, say to=models:/maze$"):
        share(trained, "to=models:/maze/3")
    with pytest.raises(UserError, match=r"^hf://a/b is shared already: ckpt= is a run's folder"):
        share(Path("nowhere"), "ckpt=hf://a/b", f"to={TO}")
