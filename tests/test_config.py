"""Hydra's side of the house: what the command line may say, and what is said of it, before anything is made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from deflow.checks import check_command
from deflow.command_line import readable
from deflow.config import CONFIG_DIR
from deflow.entry import SettingsCheck, entry_point
from deflow.errors import UserError
from tests.conftest import compose_config


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("path=a=b", "path='a=b'"),
        ("resume=logs/lr=1e-3/run", "resume='logs/lr=1e-3/run'"),
        ("ckpt=my (best) run/final.ckpt", "ckpt='my (best) run/final.ckpt'"),
        ("ckpt=o'brien", r"ckpt='o\'brien'"),
        (r"path=C:\a=b\ ".strip(), r"path='C:\a=b\\'"),
        ("data.source.path=é.npz", "data.source.path='é.npz'"),
        ("path=my file.npz", "path=my file.npz"),
        ("seed=0,1", "seed=0,1"),
        ("networks.hidden=[1, 2]", "networks.hidden=[1, 2]"),
        ("path='a=b'", "path='a=b'"),
        ("--cfg", "--cfg"),
        ("~eval", "~eval"),
        ("agent.critic=flow", "agent/critic=flow"),
        ("+settings.agent.critic=flow", "++settings={agent/critic:flow}"),
        ("+settings.agent/critic=flow", "++settings={agent/critic:flow}"),
        ("myagent.critic=flow", "myagent.critic=flow"),
        ("agent.critic.members=3", "agent.critic.members=3"),
    ],
)
def test_the_command_line_is_read_as_it_is_meant(argument: str, read: str) -> None:
    assert readable(argument) == read


@pytest.mark.parametrize("argument", ["networks.hidden=[1,2", "agent.constraints={kind: a", "name='a"])
def test_what_does_not_close_is_not_guessed(argument: str) -> None:
    with pytest.raises(UserError, match="close its brackets and quotes; as text it is"):
        readable(argument)


def command(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, main=lambda *_: None) -> int:
    """Run a command in this process, with something else in the place of what it does; its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    # It would close every handler there is, and absl's (which simulators import) closes pytest's own file with it.
    monkeypatch.setattr("hydra._internal.logging_config.configure_logging", lambda _: None)
    HydraConfig.instance().cfg = None
    try:
        entry_point(name)(main)()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["updatesz=5"], "no setting 'updatesz': did you mean 'updates'?"),
        (["agent.best_of_m=5"], "no setting 'agent.best_of_m': did you mean 'agent.best_of_n'?"),
        (["agnet=fql"], "no setting 'agnet': did you mean 'agent'?"),
        (["lr=1"], "no setting 'lr': did you mean 'agent.optimizer.lr'?"),
        (["eval.everz=1", "updatesz=5"], "no setting 'eval.everz': did you mean 'eval.every'?"),
        (["agent=iql", "agent/dynamics=flow"], "no setting 'agent/dynamics' of this agent: it is one of agent=deflow|"),
        (["agent.path=auto"], "did you mean 'data.source.path'? (agent=fql would have agent.path)"),
        (
            ["agent=fql", "agent.alpha=1"],
            "did you mean 'agent.actor.alpha'? (agent=fawac|fbrac would have agent.alpha)",
        ),
        (["agent=rlpd", "agent.max_backup=true"], "it is one of agent=cal_ql|cal_ql_original"),
        (
            ["agent=fql", "agent.refiner.steps=5"],
            "did you mean 'agent.actor.steps'? (agent=deflow would have agent.refiner)",
        ),
        (
            ["agent=flow_bc", "agent/critic=occupancy"],
            "no setting 'agent/critic' of this agent: it is one of agent=cac|",
        ),
        (["agent.optimizer.parts.critic.lr=5e-5"], "yet: add it, +agent.optimizer.parts.critic.lr=5e-5"),
        (
            ["agent=rebrac", "agent.optimizer.parts={critic: {lr: 5e-5}}"],
            "no setting 'agent.optimizer.parts.critic' yet: add it, '+agent.optimizer.parts={critic: {lr: 5e-5}}'",
        ),
        (
            ["agent=idql", "agent.every={behavior: 2}"],
            "no setting 'agent.every.behavior' yet: add it, '+agent.every={beh",
        ),
        (
            ["agent.optimizer.parts.critic.lr=1e-5", "agent.optimizer.parts.refiner.lr=1e-5"],
            "yet: add it, +agent.optimizer.parts.critic.lr=1e-5",
        ),
        (
            ["seed=0,1", "agent.optimizer.parts.critic.lr=1e-5,1e-4", "--multirun"],
            "yet: add it, +agent.optimizer.parts.critic.lr=1e-5,1e-4",
        ),
        (
            ["task=scene", "agent=idql", "agent.optimizer.parts.behavior.lr=0"],
            "agent.optimizer.parts.behavior.lr must be a number above 0, got 0",
        ),
        (
            ["task=scene", "agent=rebrac", "agent.every={}"],
            "agent.every={} would leave it as it is: ~agent.every.actor",
        ),
        (
            ["task=antmaze-umaze-v2", "agent=rebrac", "agent.optimizer.parts={}"],
            "~agent.optimizer.parts.critic takes critic out",
        ),
        (
            ["task=scene", "agent=bc", "agent/actor=gaussian"],
            "agent/actor=gaussian makes GaussianActor, and BC takes GaussianPolicy: use agent/actor=imitation",
        ),
        (["task=scene", "agent=iql", "agent/actor=gaussian"], "and IQL takes IQLActor: use agent/actor=imitation"),
        (
            ["task=scene", "agent=rlpd", "agent/actor=imitation"],
            "and RLPD takes GaussianActor: use agent/actor=gaussian",
        ),
        (["task=scene", "agent=idql", "agent/value=mean"], "and IDQL takes Value: use agent/value=expectile"),
        (
            ["task=scene", "agent=iql", "agent/critic=floq"],
            "agent/critic=floq makes FlowCritic, and IQL takes Critic: use agent/critic=ensemble|ensemble_mish|",
        ),
        (
            ["task=custom", "data.source.path=own.npz", "data.source.keys.rewards=null"],
            "data.source.keys.rewards=null: DeFlow learns from rewards; agent=bc and agent=flow_bc do without",
        ),
        (["task=scene", "stages.joint.freeze=[critic]"], "yet: add it, '+stages.joint.freeze=[critic]'"),
        (["agent.dynamics.within=0.2"], "did you mean 'agent.dynamics'?"),
        (["task=scene", "stages.jointly.steps=5"], "did you mean"),
        (["~eval.everz"], "no setting 'eval.everz': did you mean 'eval.every'?"),
        (["agent=fql", "agent.actor.alpa=1"], "no setting 'agent.actor.alpa': did you mean 'agent.actor.alpha'?"),
        (["task=scene", "agent=cac", "agent.n=50"], "no setting 'agent.n': choose among agent.critic, "),
        (["agent=nonsense"], "unknown agent 'nonsense': choose one of bc, cac, cal_ql, cal_ql_original, deflow"),
        (["+nonsense=5"], "no setting 'nonsense': choose among name, seed"),
        (["seed=abc"], "seed must be a whole number from 0 to 4294967295, got 'abc'"),
        (
            ["task=scene", "agent=srpo", "stages=srpo", "updates=abc"],
            "updates must be a whole number of at least 1, got 'abc'",
        ),
        (["seed=1"], "nothing to train on: choose task=NAME or experiment=NAME"),
        (["task=scen"], "unknown task 'scen' (did you mean 'scene'?): choose one of antmaze-large-diverse-v2, "),
        (["task=nonsense"], "unknown task 'nonsense': choose one of antmaze-large-diverse-v2, "),
        (["task=null"], "task=null is no choice: task= takes one of antmaze-large-diverse-v2, "),
        (["experiment=nonsense"], "unknown experiment 'nonsense': choose one of antmaze, antmaze-large-diverse-v2, "),
        (["experiment=online/cube_single"], "unknown experiment/online 'cube_single': choose one of antmaze-large-"),
        (["task=scene/offline_to_onlin"], "unknown task/scene 'offline_to_onlin'"),
        (["data=nonsense"], "unknown data 'nonsense': choose one of d4rl_hdf5, hdf5, lerobot, minari, npz, ogbench,"),
        (["data.source.path=[a"], "cannot read data.source.path=[a"),
        (["experiment=custom"], "Missing mandatory value: data.source.path"),
        (["experiment=antmaze-umaze-v2", "task.dataset=???"], "Missing mandatory value: task.dataset"),
        (["experiment=null"], "experiment=null is no choice: experiment= takes one of antmaze, "),
        (["logger=5"], "logger=5 is no choice: logger= takes one of csv, mlflow, tensorboard, wandb"),
        (["resume=nowhere"], "nowhere is not a run to resume"),
        (["resume="], "resume= names no folder of a run"),
        (["datamodule=x"], "no setting 'datamodule': choose among agent, task"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", arguments, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        (("agent=srpo", "networks.hidden=[8]", "tau=0.1"), ["networks.hidden=[8]"]),
        (("agent=flow_bc", "networks.hidden=[8]", "tau=0.1"), ["tau=0.1"]),
        (("agent=fql", "networks.hidden=[8]", "networks.activation=relu", "tau=0.1"), []),
        (("agent.refiner.steps=5", "agent.refiner.alpha=3"), ["agent.refiner.steps=5", "agent.refiner.alpha=3"]),
        (("agent.refiner.lagrange=false", "agent.refiner.alpha=3"), []),
        (("agent.refiner.objective=unrolled", "agent.refiner.steps=5", "agent/dynamics=flow"), []),
        (("agent=fql", "agent.actor.steps=5"), ["agent.actor.steps=5"]),
        (("agent=cac", "solver.steps=20"), ["solver.steps=20"]),
        (("agent=iql", "solver=midpoint"), ["solver=midpoint"]),
        (("agent=ifql", "solver=midpoint", "solver.steps=20"), []),
        (
            ("agent=iql", "agent.actor.extraction=ddpgbc", "agent.actor.advantage=target"),
            ["agent.actor.advantage=target"],
        ),
        (("agent=rebrac", "agent.critic.aggregate=mean"), ["agent.critic.aggregate=mean"]),
        (("agent=fql", "agent.critic.aggregate=min", "agent.critic.members=1"), ["agent.critic.aggregate=min"]),
        (("task=antmaze_medium", "agent/critic=occupancy"), ["agent.critic.aggregate=min"]),
        (("agent=rlpd", "stages=online", "agent.actor.target_entropy_multiplier=1"), []),
        (("agent=bc", "data.reward_scale=2", "task.discount=0.9"), ["data.reward_scale=2", "task.discount=0.9"]),
        (("agent=flow_bc", "data.n_step=3"), ["data.n_step=3"]),
        (("agent=fql", "agent.behavior_flow.ema=0.9"), ["agent.behavior_flow.ema=0.9"]),
        (("agent=fql", "agent.behavior_flow.ema=0.9", "stages=staged"), []),
        (("agent=fql", "agent.behavior_flow.ema=null"), []),
        (("agent=deflow", "agent.behavior_flow.ema=0.9"), []),
        (("agent=srpo", "agent.behavior.ema=0.9"), ["agent.behavior.ema=0.9"]),
        (("agent=srpo", "agent.behavior.ema=0.9", "stages=srpo"), []),
        (("iav.factor=0.1",), ["iav.factor=0.1"]),
        (("agent=fql", "iav.factor=0.1"), ["iav.factor=0.1"]),
        (("agent.trust_region=auto", "iav.factor=0.1"), []),
        (("data.source.generate_episodes=5",), ["data.source.generate_episodes=5"]),
        (("updates=5", "online_updates=5"), ["online_updates=5"]),
        (("stages.joint.steps=5", "updates=5"), ["updates=5"]),
    ],
)
def test_what_nothing_reads_is_said(
    overrides: tuple[str, ...],
    unread: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert command("train", ["task=scene", *overrides, f"hydra.run.dir={tmp_path / 'run'}"], monkeypatch) == 0
    assert [message.split()[0] for message in caplog.messages if "changes nothing" in message] == unread


def test_a_choice_of_ones_own_is_not_taken_for_the_packages_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own" / "agent" / "actor" / "gaussian.yaml"
    own.parent.mkdir(parents=True)
    shutil.copy(Path(CONFIG_DIR) / "agent" / "actor" / "imitation.yaml", own)
    given = ["task=scene", "agent=bc", "agent/actor=gaussian", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command("train", [*given, "--config-dir", str(tmp_path / "own")], monkeypatch) == 0
    assert command("train", given, monkeypatch) == 2


def test_an_agent_that_learns_by_playing_is_told_that_no_stage_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for stages in ("joint", "from_scratch"):
        given = ["task=scene", "agent=rlpd", f"stages={stages}", f"hydra.run.dir={tmp_path / stages}"]
        assert command("train", given, monkeypatch) == 0
        assert sum("no stage plays" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("overrides", "untuned"),
    [
        (("task=cube_single", "agent=cal_ql"), "agent=cal_ql on cube_single"),
        (("task=visual_scene", "agent=idql"), "agent=idql on visual_scene"),
        (("experiment=scene", "agent=cal_ql_original", "agent.samples=4"), "agent=cal_ql_original on scene"),
        (("task=cube_single", "agent=cal_ql", "~tuned"), None),  # not wanted
        (("task=scene", "agent=cal_ql"), None),
        (("task=scene", "agent=cal_ql", "stages=offline_to_online"), None),
        (("task=cube_single", "agent=flow_bc"), None),  # nothing is tuned of it anywhere
        (("task=cube_single", "agent=bc"), None),  # its row says that nothing is to be tuned
        (("task=pointmaze_medium", "agent=rlpd", "stages=from_scratch"), None),
        (("task=cube_single", "agent=cal_ql", "data=npz", "data.source.path=own.npz"), None),
        (("task=custom", "agent=cal_ql", "data.source.path=own.npz"), None),
    ],
)
def test_defaults_in_the_place_of_tuned_settings_are_said(
    overrides: tuple[str, ...],
    untuned: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert command("train", [*overrides, f"hydra.run.dir={tmp_path / 'run'}"], monkeypatch) == 0
    said = [message for message in caplog.messages if "tuned" in message]
    assert said == ([] if untuned is None else [f"nothing is tuned for {untuned}: its defaults hold"])


@pytest.mark.parametrize(
    ("overrides", "untrained"),
    [
        (("stages=staged",), []),
        (("+stages.joint.freeze=[behavior_flow]",), ["behavior_flow"]),
        (("+stages.joint.freeze=[behavior_flow]", "ckpt=final.ckpt"), []),
        (("stages=staged", "stages.behavior.train=[critic]"), ["behavior_flow"]),
        (("stages=offline_to_online", "stages.online.freeze=[behavior_flow]"), []),
        (("stages=online", "stages.online.freeze=[behavior_flow, critic]"), ["behavior_flow", "critic"]),
        (("agent/dynamics=flow", "stages=model_first"), []),
        (("agent/dynamics=flow", "stages=model_first", "~stages.model"), ["dynamics"]),
    ],
)
def test_a_part_that_is_frozen_untrained_is_said(
    overrides: tuple[str, ...],
    untrained: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert command("train", ["task=scene", *overrides, f"hydra.run.dir={tmp_path / 'run'}"], monkeypatch) == 0
    said = [message.split("'")[3] for message in caplog.messages if "which nothing before it trains" in message]
    assert said == untrained


def test_a_sweep_over_rows_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    def main(config: DictConfig, folder: Path) -> None:
        seen.append((config.name, config.agent.trust_region))

    assert command("train", ["-m", "task=scene,puzzle_3x3"], monkeypatch, main) == 0
    assert command("train", ["-m", "experiment=antmaze,online/scene"], monkeypatch, main) == 0
    assert seen == [("scene", 0.001), ("puzzle_3x3", 0.005), ("antmaze_large", 0.01), ("online/scene", 0.001)]


def test_a_task_beside_an_experiment_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", ["experiment=quickstart", "task=scene"], monkeypatch) == 0
    assert command("evaluate", ["ckpt=a", "task=scene"], monkeypatch, lambda config, _: config.task.env == "scene") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m", "seed=0,1"],
        ["hydra.run.dir=run"],
        ["hydra.run.dir=kept/new/run"],
        ["hydra.run.dir=kept/../new/run"],
        ["paths.logs=kept/../kept/up"],
    ],
)
def test_an_error_of_the_command_leaves_no_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()

    def main(config: DictConfig, folder: Path) -> None:
        assert folder.is_dir()
        raise UserError("no luck")

    assert command("train", ["experiment=pointmaze", *arguments], monkeypatch, main) == 2
    assert not list(tmp_path.glob("logs/pointmaze_medium/sweep_*/?"))
    if "-m" not in arguments:
        assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("kept")]


def test_a_bug_in_the_check_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deflow.checks.check_settings", lambda *_: 1 / 0)
    assert command("train", ["experiment=pointmaze"], monkeypatch, lambda *_: pytest.fail("went on")) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


SWEEP = ["-m", "experiment=pointmaze", "seed=0,1,2"]


def test_a_sweep_goes_on_after_a_job_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    def main(config: DictConfig, folder: Path) -> None:
        seen.append((config.seed, config.name, folder.name))
        if config.seed == 1:
            raise UserError("no luck")

    assert command("train", SWEEP, monkeypatch, main) == 2
    assert seen == [(seed, "pointmaze_medium", str(seed)) for seed in range(3)]
    lines = capsys.readouterr().err.splitlines()
    assert "error: experiment=pointmaze seed=1: no luck" in lines
    assert lines[-1] == "error: 1 of 3 jobs failed"
    assert {path.name for path in tmp_path.glob("logs/pointmaze_medium/sweep_*/*")} == {"0", "2", "multirun.yaml"}


def test_a_bug_in_a_sweep_is_not_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def main(config: DictConfig, folder: Path) -> None:
        if config.seed != 0:
            raise UserError("no luck") if config.seed == 1 else ZeroDivisionError("a bug")

    assert command("train", SWEEP, monkeypatch, main) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1] == "error: 2 of 3 jobs failed"


def test_a_job_of_a_sweep_is_checked_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", ["-m", "experiment=pointmaze", "seed=0,abc"], monkeypatch) == 2
    assert "seed=abc: seed must be a whole number" in capsys.readouterr().err
    assert {path.name for path in tmp_path.glob("logs/pointmaze_medium/sweep_*/*")} == {"0", "multirun.yaml"}


def test_a_sweep_without_failures_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", SWEEP, monkeypatch) == 0
    assert command("evaluate", ["-m", "ckpt=a.ckpt", "best_of_n=1,4"], monkeypatch) == 0


def job(run_dir: str, *overrides: str) -> DictConfig:
    given = {"overrides": {"task": ["task=scene", *overrides]}, "runtime": {"choices": {"task": "scene"}}}
    return OmegaConf.create({"mode": "RUN", "run": {"dir": run_dir}, **given})


@pytest.mark.parametrize(
    ("name", "overrides", "run_dir", "says"),
    [
        ("train", ["paths.logs=FILE"], "${run_folder:}", "paths.logs: FILE is not a folder"),
        ("train", ["paths.logs=FILE/below"], "${run_folder:}", "paths.logs: FILE is not a folder"),
        ("train", [], "FILE", "hydra.run.dir: FILE is not a folder"),
        ("train", ["resume=FILE"], ".", "resume: FILE is not a folder"),
        ("distill", ["ckpt=a", "paths.logs=FILE"], "${run_folder:}", "paths.logs: FILE is not a folder"),
        ("export", ["ckpt=a", "out=FOLDER"], ".", "out: FOLDER is a folder, name a file"),
        ("generate", ["dataset=a", "out=FILE"], ".", "out: FILE is not a folder"),
        ("inspect_data", ["out=FILE"], ".", "out: FILE is not a folder"),
        ("benchmark", ["out=FOLDER"], ".", "out: FOLDER is a folder, name a file"),
        ("train_expert", ["out=FILE/ant.safetensors"], ".", "out: FILE is not a folder"),
    ],
)
def test_a_place_where_nothing_can_be_written(
    name: str, overrides: list[str], run_dir: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    def real(text: str) -> str:
        return text.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))

    config = compose_config(*map(real, overrides), config_name=name)
    with pytest.raises(UserError) as caught:
        check_command(config, job(real(run_dir)), name)
    assert real(says) in str(caught.value)


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # who is root may write anywhere
    with pytest.raises(UserError, match=r"paths.logs: nothing can be written into"):
        check_command(compose_config(f"paths.logs={tmp_path}/logs"), job("${run_folder:}"), "train")


def test_every_command_is_checked_before_hydra_makes_a_folder() -> None:
    for name in ("default", "no_folder"):
        hydra = compose_config(f"hydra={name}", "hydra.job.name=none", return_hydra_config=True).hydra
        target = hydra.callbacks.check._target_
        assert target == f"{SettingsCheck.__module__}.{SettingsCheck.__name__}"
