"""A run as a whole: what it leaves, how it goes on, how it stops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from deflow import precision
from deflow.agents.base import Agent
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.errors import NonFiniteLossError, UserError
from deflow.evaluating import evaluate
from deflow.loggers import read_metrics
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import Critic
from deflow.pipeline import train
from deflow.report import write_json
from tests.conftest import compose_config, tiny_config

pytestmark = pytest.mark.usefixtures("short_episodes")

DECAY = ("stages.behavior.cosine_decay=true",)
STAGES = {"joint": ["0_joint"], "staged": ["0_behavior", "1_extraction"]}


OF_STATES = "{observation_mean:[0.5],observation_std:[2.0],reward_centre:-0.5,reward_scale:0.5}"


def run(folder: Path, data: Path, *overrides: str) -> dict:
    return train(tiny_config(data, "experiment=pointmaze", *overrides), folder)


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / stage / "final.ckpt")["state_dict"]


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("stages", STAGES)
def test_what_a_run_leaves(stages: str, point_data: Path, tmp_path: Path) -> None:
    summary = run(tmp_path, point_data, f"stages={stages}")
    assert {"config.yaml", "summary.json", "metrics.csv", "report.png", "checkpoints"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("report.png", "actions.png"))
    assert not list(tmp_path.rglob(".part-*"))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["updates"] == 6 * len(STAGES[stages])
    assert summary["evaluations"] == 2
    assert set(summary["eval/success"]) == {
        "last",
        "mean_of_last_three",
        "best",
        "last_interval_95",
        "last_of_stage",
    }
    assert set(summary["updates_per_second"]) == {stage[2:] for stage in STAGES[stages]}
    assert summary["success_timing"] == "pre"
    assert {"torch", "ogbench", "mujoco"} <= set(summary["versions"])
    rows = read_metrics(tmp_path / "metrics.csv")
    steps = [row["step"] for row in rows if "train/behavior_flow/loss" in row]
    assert steps == [2, 4, 6]
    assert any("val/behavior_flow/loss" in row for row in rows)
    for stage in STAGES[stages]:
        checkpoint = torch.load(tmp_path / "checkpoints" / stage / "final.ckpt", weights_only=True)
        assert checkpoint["deflow"]["task"] == "pointmaze-medium-navigate-singletask-v0"


@pytest.mark.parametrize("per_dimension", [False, True])
def test_a_trust_region_from_the_data(per_dimension: bool, point_data: Path, tmp_path: Path) -> None:
    overrides = ("agent.trust_region=auto", "iav.factor=0.5", f"iav.per_dimension={per_dimension}")
    summary = run(tmp_path, point_data, *overrides)
    delta, iav = summary["trust_region"], summary["iav"]
    expected = [0.5 * v for v in iav["per_dimension"]] if per_dimension else 0.5 * iav["mean"]
    assert delta == pytest.approx(expected)
    trained = load_checkpoint(tmp_path / "checkpoints" / "0_joint" / "final.ckpt")["deflow"]
    assert trained["config"]["agent"]["trust_region"] == delta
    resumed = train(tiny_config(point_data, "experiment=pointmaze", f"resume={tmp_path}"), tmp_path)
    assert resumed["trust_region"] == summary["trust_region"]


def test_stages_train_only_their_parts(point_data: Path, tmp_path: Path) -> None:
    run(tmp_path, point_data, "stages=staged", "stages.extraction.proposals=2")
    behavior, extraction = (weights(tmp_path, stage) for stage in STAGES["staged"])
    for name in behavior:
        moved = not torch.equal(behavior[name], extraction[name])
        assert moved == (not name.startswith("behavior_flow")), name


def test_a_stage_may_have_a_learning_rate_that_decays(point_data: Path, tmp_path: Path) -> None:
    run(tmp_path, point_data, "stages=staged", "stages.behavior.lr=0.01", "stages.behavior.cosine_decay=true")
    folder = tmp_path / "checkpoints" / "0_behavior"
    # Half a cosine over 6 updates: 0.01 at the start, 0 at the end.
    (scheduler,) = load_checkpoint(folder / "final.ckpt")["lr_schedulers"]
    assert scheduler["base_lrs"] == [0.01]
    assert scheduler["_last_lr"] == [pytest.approx(0.0, abs=1e-8)]


def test_the_same_seed_gives_the_same_weights(
    finished_run: Callable[..., Path], point_data: Path, tmp_path: Path
) -> None:
    run(tmp_path, point_data)
    a, b, c = (weights(folder, "0_joint") for folder in (finished_run(), tmp_path, finished_run("seed=1")))
    assert_equal_weights(a, b)
    assert not torch.equal(a["critic.online.layers.0.weight"], c["critic.online.layers.0.weight"])


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    "stages,at,seeds,more",
    [
        ("joint", 4, 1, ()),
        ("joint", 3, 1, ("agent/dynamics=flow", "agent.dynamics.one_step=true")),
        ("staged", 3, 1, DECAY),
        ("staged", 6, 1, DECAY),
        ("staged", 9, 1, DECAY),
        ("staged", 11, 1, DECAY),
        ("staged", 9, 2, DECAY),
    ],
)
def test_resume_is_bit_for_bit(
    stages: str,
    at: int,
    seeds: int,
    more: tuple[str, ...],
    finished_run: Callable[..., Path],
    point_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = finished_run(f"stages={stages}", f"seeds={seeds}", *more)
    updates = 0
    training_step = Agent.training_step

    def dies(agent, batch, batch_idx):
        nonlocal updates
        updates += 1
        if updates > at:
            raise Killed
        return training_step(agent, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Agent, "training_step", dies)
        with pytest.raises(Killed):
            run(tmp_path / "killed", point_data, f"stages={stages}", f"seeds={seeds}", *more)
    resumed = compose_config(f"resume={tmp_path / 'killed'}")
    train(resumed, tmp_path / "killed")
    for stage in STAGES[stages]:
        assert_equal_weights(weights(whole, stage), weights(tmp_path / "killed", stage))
    logs = [read_metrics(folder / "metrics.csv") for folder in (whole, tmp_path / "killed")]
    evaluations = [[row for row in rows if "eval/success" in row] for rows in logs]
    assert evaluations[0] == evaluations[1]
    training = [[row for row in rows if "train/critic/loss" in row] for rows in logs]
    assert training[0] == training[1]


def test_a_finished_run_is_not_repeated(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    monkeypatch.setattr(Agent, "training_step", lambda *_: pytest.fail("trained again"))
    again = train(compose_config(f"resume={folder}"), folder)
    assert again["eval/success"] == summary["eval/success"]
    assert again["updates_per_second"] == summary["updates_per_second"]


def test_numbers_that_were_not_finite_are_shown_again(
    finished_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished_run(), tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["eval/return"]["last"] = float("nan")
    summary["dynamics"] = {"error": {"sample": {"1": 0.5, "5": float("inf")}}}
    write_json(folder / "summary.json", summary)
    train(compose_config(f"resume={folder}"), folder)
    shown = " ".join(capsys.readouterr().out.split())
    assert "sample 0.5, -" in shown
    assert "nan" not in shown


def test_nan_stops_with_part_step_and_checkpoint(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = BehaviorFlow.loss, 0

    def turns_nan(self, batch, x_0, times):
        nonlocal calls
        calls += 1
        value, metrics = loss(self, batch, x_0, times)
        return (value * float("nan") if calls == 5 else value), metrics

    monkeypatch.setattr(BehaviorFlow, "loss", turns_nan)
    expected = r"'behavior_flow' is not finite at update 5 of stage 'behavior'; last good checkpoint: .*last.ckpt"
    with pytest.raises(NonFiniteLossError, match=expected):
        run(tmp_path, point_data, "stages=staged", "validate_every=6")
    good = load_checkpoint(tmp_path / "checkpoints" / "0_behavior" / "last.ckpt")
    assert good["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in good["state_dict"].values())


def test_nan_in_a_later_stage_names_the_checkpoint_of_an_earlier_one(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Critic.loss

    def is_nan(self, *arguments):
        value, metrics = loss(self, *arguments)
        return value * float("nan"), metrics

    monkeypatch.setattr(Critic, "loss", is_nan)
    expected = r"'critic' is not finite at update 1 of stage 'extraction'; last good checkpoint: .*0_behavior/final"
    with pytest.raises(NonFiniteLossError, match=expected):
        run(tmp_path, point_data, "stages=staged")


@pytest.mark.parametrize(
    "override,says",
    [
        ("updates=0", "updates must be a whole number of at least 1, got 0"),
        ("data.batch_size=100000", "larger than the data"),
        ("stages.joint.train=[actor]", "choose among the agent's parts"),
        ("+stages.joint.proposals=2", r"keep from its beginning: freeze it, stages.joint.freeze=\[behavior_flow\]"),
        (
            "stages=offline_to_online +stages.online.proposals=2 +stages.online.freeze=[behavior_flow]",
            "'online' meets states that have no cached proposals: set stages.online.proposals=null",
        ),
        ("task.env=nonsense", "OGBench has no environment"),
        ("ckpt=nowhere.ckpt", "no checkpoint"),
        ("logger=mlflow logger.tracking_uri=http://127.0.0.1:9", "no MLflow server answers"),
        ("logger=mlflow logger.tracking_uri=ftp://x", "must start with sqlite"),
    ],
)
def test_bad_settings_leave_no_folder(override: str, says: str, point_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=says):
        run(folder, point_data, *override.split())
    assert not folder.exists()


def test_each_of_several_seeds_is_as_alone(point_data: Path, tmp_path: Path) -> None:
    overrides = ("stages=staged", "stages.extraction.proposals=2", "data.n_step=2")
    summary = run(tmp_path / "both", point_data, *overrides, "seed=3", "seeds=2")
    assert set(summary["eval/success"]["last_of_seed"]) == {3, 4}
    folder = tmp_path / "both" / "checkpoints" / "1_extraction"
    for seed in (3, 4):
        run(tmp_path / str(seed), point_data, *overrides, f"seed={seed}")
        together = load_checkpoint(folder / f"seed_{seed}.ckpt")
        alone = load_checkpoint(tmp_path / str(seed) / "checkpoints" / "1_extraction" / "final.ckpt")
        configs = [card["deflow"]["config"] | {"iav": None} for card in (together, alone)]  # measured once for all
        assert configs[0] == configs[1]
        for name, expected in weights(tmp_path / str(seed), "1_extraction").items():
            torch.testing.assert_close(together["state_dict"][name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert agent_of(load_checkpoint(folder / "seed_4.ckpt")).parts == ("behavior_flow", "critic", "refiner")
    with pytest.raises(UserError, match=r"holds 2 seeds: take one of those beside it, as seed_3\.ckpt"):
        agent_of(load_checkpoint(folder / "final.ckpt"))


@pytest.mark.parametrize("override", ["stages=offline_to_online", "trainer=ddp_sim"])
def test_several_seeds_where_they_cannot_be_stacked(override: str, point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the seeds one by one"):
        run(tmp_path, point_data, "seeds=2", override)


def test_the_faster_precision_is_taken_and_kept(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timings = iter([9.0, 9.0, *[2.0, 1.0] * 4])  # the first round warms up
    monkeypatch.setattr(precision, "seconds_of_updates", lambda *_: next(timings))
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: 4.0)
    with caplog.at_level("INFO"):
        run(tmp_path, point_data, "trainer.precision=auto")
    assert "precision bf16-mixed: an update in bf16-mixed is 2.00 times as fast" in caplog.text
    trained = load_checkpoint(tmp_path / "checkpoints" / "0_joint" / "final.ckpt")["deflow"]
    assert trained["config"]["trainer"]["precision"] == "bf16-mixed"
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.precision == "bf16-mixed"


def test_slow_products_decide_alone(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: 0.25)
    monkeypatch.delattr(precision, "seconds_of_updates")
    with caplog.at_level("INFO"):
        run(tmp_path, point_data, "trainer.precision=auto")
    assert "precision 32-true: a product in bfloat16 is 0.25 times as fast" in caplog.text
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.precision == "32-true"


def test_comparing_changes_no_weight(finished_run: Callable[..., Path], point_data: Path, tmp_path: Path) -> None:
    run(tmp_path / "auto", point_data, "trainer.precision=auto")
    precision = OmegaConf.load(tmp_path / "auto" / "config.yaml").trainer.precision
    chosen = finished_run(f"trainer.precision={precision}")
    assert_equal_weights(*(weights(folder, "0_joint") for folder in (tmp_path / "auto", chosen)))
    with pytest.raises(UserError, match="compares on trainer=cpu alone"):
        run(tmp_path / "ddp", point_data, "trainer.precision=auto", "trainer=ddp_sim")


def test_a_full_disk_keeps_the_checkpoint_before(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, 0

    def fills_up(content, file):
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(UserError, match=r"last.ckpt: No space left on device"):
        run(tmp_path, point_data)
    assert load_checkpoint(tmp_path / "checkpoints" / "0_joint" / "last.ckpt")["global_step"] == 2
    assert not list(tmp_path.rglob(".part-*"))


def test_weights_of_another_run(finished_run: Callable[..., Path], point_data: Path, tmp_path: Path) -> None:
    final = shutil.copy(finished_run() / "checkpoints" / "0_joint" / "final.ckpt", tmp_path)
    run(tmp_path / "second", point_data, f"ckpt={final}")
    with pytest.raises(UserError, match=r"is a checkpoint of pointmaze-medium-navigate-singletask-v0, not of"):
        run(tmp_path / "third", point_data, f"ckpt={final}", "task_id=2")
    with pytest.raises(UserError, match=r"of DeFlow, differ from the configured ones: size mismatch for behavior_flow"):
        run(tmp_path / "fourth", point_data, f"ckpt={final}", "networks.hidden=[8,8]")
    with pytest.raises(UserError, match=r"of DeFlow, differ from the configured ones, as in '[a-z]+\.[\w.]+'$"):
        run(tmp_path / "of_fql", point_data, f"ckpt={final}", "agent=fql")
    Path(final).write_bytes(Path(final).read_bytes()[:-500])
    with pytest.raises(UserError, match="not a whole checkpoint"):
        run(tmp_path / "fifth", point_data, f"ckpt={final}")


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("agent/critic=flow", "agent.critic.value_range", "[-7.0,0.0]"),
        ("agent/critic=occupancy", "agent.critic.statistics", OF_STATES),
        (
            "agent/dynamics=gaussian",
            "agent.dynamics.statistics",
            OF_STATES[:-1] + ",change_mean:[0.5],change_std:[2.0]}",
        ),
        ("agent.horizon=2", "agent.path", "{mean:[0.5],std:[2.0]}"),
    ],
)
def test_weights_bring_the_units_that_they_are_in(
    kind: str, setting: str, value: str, point_data: Path, tmp_path: Path
) -> None:
    settings = "experiment=pointmaze", "agent=fql", kind
    train(tiny_config(point_data, *settings, f"{setting}={value}"), tmp_path / "first")
    train(tiny_config(point_data, *settings, f"{setting}=auto", f"ckpt={tmp_path / 'first'}"), tmp_path / "second")
    theirs, ours = (
        OmegaConf.select(OmegaConf.load(tmp_path / run / "config.yaml"), setting) for run in ("first", "second")
    )
    assert ours == theirs
    other = value.replace("7.0", "8.0").replace("2.0", "3.0")
    with pytest.raises(UserError, match=f"^{setting} is not that of ckpt, whose weights mean nothing with another"):
        train(
            tiny_config(point_data, *settings, f"{setting}={other}", f"ckpt={tmp_path / 'first'}"), tmp_path / "third"
        )
    assert not (tmp_path / "third").exists()
    settings = (*settings, f"{setting}={other}", f"ckpt={tmp_path / 'first'}")
    with pytest.raises(UserError, match="is a checkpoint of"):  # said first
        train(tiny_config(point_data, *settings, "task_id=2"), tmp_path / "third")
    begun = tmp_path / "second"  # as an older version would have: with what the data say
    config = OmegaConf.load(begun / "config.yaml")
    OmegaConf.update(config, setting, OmegaConf.create(f"value: {other.replace(':', ': ')}").value)
    OmegaConf.save(config, begun / "config.yaml")
    shutil.rmtree(begun / "checkpoints")
    (begun / "summary.json").unlink()
    train(compose_config(f"resume={begun}"), begun)
    assert (begun / "summary.json").exists()


def test_evaluate_a_checkpoint(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    final = Path(shutil.copy(finished_run() / "checkpoints" / "0_joint" / "final.ckpt", tmp_path))
    config = compose_config(f"ckpt={final}", "episodes=3", "best_of_n=4", "refine_steps=2", config_name="evaluate")
    result = evaluate(config)
    assert (result["episodes"], result["best_of_n"], result["refine_steps"]) == (3, 4, 2)
    assert json.loads(final.with_name("evaluation.json").read_text()) == result
    assert evaluate(compose_config(f"ckpt={final}", "episodes=1", "task=pointmaze_medium", config_name="evaluate"))
    with pytest.raises(UserError, match=r"is a checkpoint of pointmaze-medium navigate, not of scene play"):
        evaluate(compose_config(f"ckpt={final}", "task=scene", config_name="evaluate"))
    config.ckpt = str(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(config)


@pytest.mark.parametrize(("asked", "convolutions"), [("highest", False), ("high", True), ("medium", True)])
def test_convolutions_are_as_precise_as_products(
    asked: str, convolutions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not convolutions)
    precision.set_product_precision(asked)
    assert torch.get_float32_matmul_precision() == asked
    assert torch.backends.cudnn.allow_tf32 is convolutions


def test_a_run_sums_gradients_of_convolutions_in_a_fixed_order(
    point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    run(tmp_path, point_data)
    assert torch.backends.cudnn.deterministic
