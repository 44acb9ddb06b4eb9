"""What is exported acts as the checkpoint does, and says of itself what is needed to act with it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from onnx import TensorProto, helper

import deflow
from deflow import evaluating, exporting
from deflow.build import build_agent
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.checks import check_command
from deflow.command_line import choices
from deflow.config import plain
from deflow.errors import UserError
from deflow.evaluating import evaluate
from deflow.evaluation import latency
from deflow.evaluation.parity import Remembering, parity, random_states
from deflow.exported import About, ExportedPolicy
from deflow.exporting import IR, OPSET, as_onnx, export
from deflow.policy import Policy
from deflow.types import Spec
from deflow.units import AS_THEY_ARE, Units
from tests.agents.tester import Acting
from tests.commands import ROOT
from tests.conftest import CKPT, compose_config

# Rounding of float32 is 1e-7 of a number; a few dozen layers one after the other, each a sum of 16 numbers, add up.
ROUNDING = 1e-5

UNITS = Units(low=(-2.0, 0.0), high=(2.0, 3.0), mean=(100.0, 0.0, -5.0), std=(0.1, 1.0, 3.0))
IMAGE = Spec(2 * 8 * 8 * 3, 2, image=(2, 8, 8, 3))
SMALL = ("experiment=pointmaze", "networks.hidden=[8]")
CHUNKS = ("agent.horizon=2", "agent.best_of_n=2", "solver=midpoint", "solver.steps=1")
ENCODER = ("networks.encoder.stacks=[2]", "networks.encoder.features=4", "solver.steps=1")
# What makes the graphs small, of agents whose networks have sizes of their own and of those that choose.
NARROW = {
    "idql": ("agent.behavior.width=4", "agent.behavior.blocks=1", "agent.behavior.steps=2", "agent.best_of_n=2"),
    "ifql": ("agent.best_of_n=2",),
    "cac": ("agent.actor.hidden=[8]", "agent.best_of_n=2"),
}
# Flow, refiner and the best of several, as a chunk; diffusion.
OF_STATES: dict[str, tuple[Units, tuple[str, ...]]] = {"deflow": (UNITS, CHUNKS), "idql": (AS_THEY_ARE, NARROW["idql"])}
# Every agent, but for those that are another one with other numbers.
OF_IMAGES = [name for name in choices("agent") if not name.endswith("_original")]
SEEN_FIRST = ("deflow", "fql", "idql", "iql")  # the others are as slow, and graphs of the same modules


def policy_of(name: str, spec: Spec, units: Units, *overrides: str) -> Policy:
    torch.manual_seed(0)
    agent = build_agent(compose_config(*SMALL, f"agent={name}", *overrides).agent, spec)
    agent.freeze()
    return Policy(agent, units=units)


def about(policy: Policy) -> About:
    return About("Any", "task", {}, {}, policy.spec, policy.units, policy.noise_shape, "0")


def exported_of(policy: Policy, folder: Path) -> ExportedPolicy:
    """The policy as a file, which says what the policy says, and decides the same."""
    path = folder / "policy.onnx"
    path.write_bytes(as_onnx(policy, about(policy)))
    exported = ExportedPolicy(path)
    assert (exported.spec, exported.units, exported.noise_shape) == (policy.spec, policy.units, policy.noise_shape)
    found = parity(policy, exported, random_states(policy, 60))  # 50 at once and 10
    assert found["max_difference"] < ROUNDING
    assert found["beyond_tolerance"] == 0
    return exported


@pytest.mark.parametrize("name", OF_STATES)
def test_every_kind_of_decision(name: str, tmp_path: Path) -> None:
    units, overrides = OF_STATES[name]
    policy = policy_of(name, Spec(3, 2), units, *overrides)
    check_acting(policy, exported_of(policy, tmp_path), 100 * np.random.default_rng(0).normal(size=(4, 3)))


@pytest.mark.parametrize(
    "name", [name if name in SEEN_FIRST else pytest.param(name, marks=pytest.mark.slow) for name in OF_IMAGES]
)
def test_every_agent_of_images(name: str, tmp_path: Path) -> None:
    policy = policy_of(name, IMAGE, AS_THEY_ARE, *ENCODER, *NARROW.get(name, ()))
    exported = exported_of(policy, tmp_path)
    check_acting(policy, exported, np.random.default_rng(0).integers(256, size=(4, 2, 8, 8, 3), dtype=np.uint8))


def check_acting(policy: Policy, exported: ExportedPolicy, seen: np.ndarray) -> None:
    """With the same seed both act the same, whether asked for one observation or for several."""
    actions = {}
    for one in (policy, exported):
        one.reset(seed=7)
        alone = [one.act(seen[0]) for _ in range(3)]
        one.reset(seed=7)
        actions[one] = np.stack([*alone, *one.act(seen)])
    np.testing.assert_allclose(actions[exported], actions[policy], atol=3 * ROUNDING)  # half of units' widest range
    np.testing.assert_allclose(actions[exported][0], actions[exported][3], atol=ROUNDING)


def test_parity_tells_policies_apart(tmp_path: Path) -> None:
    class Noise(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return z.tanh()

    class Other(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.where(observations[:, :1] > 0, z.tanh() + 0.5, z.tanh())

    units = Units(low=(-10.0,) * 2, high=(10.0,) * 2)
    one, other = (Policy(agent(Spec(3, 2)), units=units) for agent in (Noise, Other))
    found = parity(one, other, random_states(one, 200))
    assert found["max_difference"] == pytest.approx(0.5, abs=ROUNDING)  # of actions in [-1, 1], not of the units' 10
    assert 0.3 < found["beyond_tolerance"] < 0.7
    assert found["observations"] == 200


# The command.


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WARM_UP", 1)
    monkeypatch.setattr(latency, "CALLS", 5)


def edited(run: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A folder with a run's checkpoint, its configuration changed."""
    checkpoint = load_checkpoint(run / CKPT)
    edit(checkpoint["deflow"]["config"])
    (folder / CKPT).parent.mkdir(parents=True)
    torch.save(checkpoint, folder / CKPT)
    return folder


def command(run: Path, out: Path, *overrides: str) -> dict[str, Any]:
    settings = (f"ckpt={run / CKPT}", f"out={out}", "episodes=2", "threads=1", *overrides)
    return export(compose_config(*settings, config_name="export"))


@pytest.mark.usefixtures("short_episodes")
def test_a_run_as_onnx(
    finished_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "robot" / "policy.onnx"
    run = edited(
        finished_run(), tmp_path / "run", lambda config: config["agent"]["behavior_flow"]["solver"].update(steps=1)
    )
    result = command(run, out, "best_of_n=2")
    assert {path.name for path in out.parent.iterdir()} == {"policy.onnx", "policy.onnx.json"}
    assert json.loads((out.parent / "policy.onnx.json").read_text()) == json.loads(json.dumps(result))
    for name, count in (("parity", 1000), ("parity_in_episodes", result["checkpoint"]["length"] * 2)):
        assert result[name]["max_difference"] < ROUNDING
        assert result[name]["observations"] == count  # the second are fewer than would be remembered
    assert (result["agent"], result["best_of_n"], result["opset"]) == ("DeFlow", 2, OPSET)
    for batch in ("batch_1", "batch_64"):
        measured = result["exported"][batch]
        assert 0 < measured["latency_ms_p50"] <= measured["latency_ms_p99"]
        assert measured["latency_calls"] == 5
    assert result["exported"]["success"] == result["checkpoint"]["success"]
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    assert said.count("(5)") == 4

    model = onnx.load(out)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert model.ir_version == IR
    assert str(Path(deflow.__file__).parent) not in str(model)  # nothing of the machine that made it
    about_itself = json.loads(model.metadata_props[0].value)
    assert about_itself["shapes"] == {"observations": [2], "noise": [2, 2], "actions": [1, 2]}
    assert (about_itself["settings"]["best_of_n"], about_itself["protocol"]["protocol"]) == (2, "OGBench single-task")

    checkpoint, exported = deflow.load(run, seed=3, best_of_n=2), deflow.load(out, seed=3)
    for _ in range(3):
        np.testing.assert_allclose(exported.act([1.0, 2.0]), checkpoint.act([1.0, 2.0]), atol=ROUNDING)
    with pytest.raises(UserError, match=r"an observation has shape \(2,\), or several \('batch', 2\), got \(3,\)"):
        exported.act([1.0, 2.0, 3.0])
    asked: list[tuple[dict[str, Any], str]] = [
        ({"best_of_n": 4}, "has its best_of_n inside: export the checkpoint anew with best_of_n=4"),
        ({"explore": True}, "takes the best actions alone"),
        ({"device": "cuda"}, "is computed on the CPU"),
        ({"run_seed": 0}, "run_seed chooses among the seeds"),
        ({"seed": -1}, "seed must be a whole number"),
    ]
    for settings, says in asked:
        with pytest.raises(UserError, match=re.escape(says)):
            deflow.load(out, **settings)
    names: dict[str, Any] = {"observation": np.array([1.0, 2.0])}  # float64, as OGBench gives them
    monkeypatch.chdir(out.parent)
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL):
        exec(code, names)  # the page's own text
    assert (names["action"].shape, names["actions"].shape) == ((2,), (1, 1, 2))
    with pytest.raises(
        UserError, match=r"holds policy.onnx, policy.onnx.json: choose another out=, or say overwrite=true"
    ):
        command(run, out)
    (tmp_path / "half.onnx").write_bytes(out.read_bytes()[: out.stat().st_size // 2])
    with pytest.raises(UserError, match="it is no whole ONNX model"):
        deflow.load(tmp_path / "half.onnx")


@pytest.mark.usefixtures("short_episodes")
def test_a_run_as_weights(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "policy.safetensors"
    result = command(finished_run(), out, "format=torch", "refine_steps=2")
    assert result["parity"]["max_difference"] == 0
    assert result["exported"]["success"] == result["checkpoint"]["success"]
    trained = load_checkpoint(finished_run() / CKPT)
    exported = load_checkpoint(out)
    assert exported["deflow"]["config"]["agent"] == trained["deflow"]["config"]["agent"] | {"refine_steps": 2}
    assert "optimizer_states" not in exported
    assert out.stat().st_size < (finished_run() / CKPT).stat().st_size
    same = deflow.load(finished_run(), best_of_n=3, refine_steps=2, explore=True, seed=1)
    assert np.array_equal(deflow.load(out, best_of_n=3, explore=True, seed=1).act([1.0, 2.0]), same.act([1.0, 2.0]))
    assert agent_of(exported).refine_steps == 2
    result = command(finished_run(), out, "format=torch", "overwrite=true", "episodes=0")
    assert not {"success", "parity_in_episodes"} & {*result, *result["exported"]}


def test_a_run_without_an_environment_whose_data_are_gone(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    source = compose_config("experiment=custom", f"data.source.path={tmp_path}/gone.npz").data.source
    run = edited(finished_run(), tmp_path / "run", lambda config: config["data"].update(source=plain(source)))
    result = command(run, tmp_path / "policy.safetensors", "format=torch")
    assert result["protocol"] == "OGBench single-task"  # as the checkpoint says, and not the data, which are gone
    assert "success" not in result["checkpoint"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("ckpt=none.ckpt",), "no checkpoint none.ckpt"),
        (("format=torch",), "out: format=torch makes a file that ends in .safetensors, got policy.onnx"),
        (("best_of_n=0",), "agent.best_of_n must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_exported(
    overrides: tuple[str, ...], says: str, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        command(finished_run(), tmp_path / "out" / "policy.onnx", *overrides)
    assert not list(tmp_path.iterdir())


def test_a_solver_that_chooses_its_steps() -> None:
    policy = policy_of("flow_bc", Spec(3, 2), AS_THEY_ARE, "solver=dopri5")
    with pytest.raises(UserError, match=r"solver=dopri5 chooses its steps as it goes") as error:
        as_onnx(policy, about(policy))
    assert "\n" not in str(error.value)


def test_an_agent_that_python_decides_for() -> None:
    class Deciding(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return z if observations.sum().item() > 0 else -z

    policy = Policy(Deciding(Spec(3, 2)))
    with pytest.raises(UserError, match="Deciding cannot be written as ONNX: ") as error:
        as_onnx(policy, about(policy))
    assert "\n" not in str(error.value)


def test_what_acts_otherwise_is_not_written(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "load", lambda _, trust: deflow.load(finished_run(), refine_steps=5))
    with pytest.raises(UserError, match=r"the exported policy acts otherwise: .* of 1000 random observations differ"):
        command(finished_run(), tmp_path / "policy.safetensors", "format=torch")
    assert not list(tmp_path.iterdir())


def test_what_acts_otherwise_in_episodes_alone_is_not_written(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Far(Policy):
        def plan(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
            return np.where(np.abs(observations).max(1)[:, None, None] > 10, 0, super().plan(observations, noise))

    def loaded(_: Path, trust: list[str]) -> Policy:
        policy = deflow.load(finished_run())
        assert isinstance(policy, Policy)
        return Far(policy.agent, units=policy.units)

    def played(policy: Remembering, *_: Any) -> dict[str, float]:
        policy.plan(np.full((3, 2), 50.0), np.zeros((3, *policy.noise_shape), np.float32))
        return {}

    monkeypatch.setattr(exporting, "load", loaded)
    monkeypatch.setattr(exporting, "play", played)
    with pytest.raises(UserError, match=r"acts otherwise: 100.0% of 3 states of the episodes differ by"):
        command(finished_run(), tmp_path / "policy.safetensors", "format=torch")
    assert not list(tmp_path.iterdir())


def test_states_are_remembered_with_equal_chances() -> None:
    policy = Remembering(policy_of("bc", Spec(1, 2), AS_THEY_ARE), most=100)
    for state in range(500):
        policy.plan(np.full((2, 1), state), np.zeros((2, *policy.noise_shape), np.float32))
    assert policy.met.shape == (100, 1)
    assert 200 < policy.met.mean() < 300


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_broken_weights_are_not_written(format: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained / CKPT, weights_only=True)
    for weight in checkpoint["state_dict"].values():
        weight.fill_(torch.nan)
    (tmp_path / CKPT).parent.mkdir(parents=True)
    torch.save(checkpoint, tmp_path / CKPT)
    out = tmp_path / ("policy.onnx" if format == "onnx" else "policy.safetensors")
    with pytest.raises(UserError, match=r"actions are NaN or infinite .* the weights are broken; nothing was written"):
        command(tmp_path, out, f"format={format}")
    assert not out.exists()


def test_what_is_nan_in_one_alone_differs() -> None:
    class Broken(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.full_like(z, torch.nan)

    spec = Spec(3, 2)
    found = parity(policy_of("bc", spec, AS_THEY_ARE), Policy(Broken(spec)), np.zeros((10, 3)))
    assert found["beyond_tolerance"] == 1


def test_the_data_need_not_be_there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(trained / CKPT)
    monkeypatch.setattr("deflow.data.sources.ogbench.OGBenchSource.protocol", lambda _: pytest.fail("asks the data"))
    assert exporting.about_of(Policy(agent_of(checkpoint)), checkpoint["deflow"], None).protocol["success_timing"]  # type: ignore[arg-type]


def test_a_package_that_is_missing(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    says = "needs the package onnxruntime: pip install onnxruntime"
    with pytest.raises(UserError, match=rf"format=onnx {says}"):
        command(finished_run(), tmp_path / "policy.onnx")
    (tmp_path / "policy.onnx").touch()
    with pytest.raises(UserError, match=says):
        deflow.load(tmp_path / "policy.onnx")


@pytest.mark.parametrize(("command", "says"), [(export, "out"), (evaluate, "ckpt")])
def test_a_runs_folder_whose_checkpoints_are_read_only(
    command: Callable[..., Any],
    says: str,
    finished_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = edited(finished_run(), tmp_path / "run", lambda config: None)
    stage = (run / CKPT).parent
    monkeypatch.setattr(exporting, "play", lambda *_: pytest.fail("plays first"))
    monkeypatch.setattr(evaluating, "play", lambda *_: pytest.fail("plays first"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != stage)  # who is root may write anywhere
    with pytest.raises(UserError, match=f"^{says}: nothing can be written into {stage}, choose another folder$"):
        command(compose_config(f"ckpt={run}", config_name=command.__name__))
    for name in ("export", "evaluate"):  # the folder of the run's folder need not be written to
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        check_command(compose_config(f"ckpt={run}", config_name=name), OmegaConf.create({}), name)


# Files of others.


def identity(metadata: dict[str, str], *sizes: int) -> bytes:
    """A model that gives its only input."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *sizes]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "graph", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


SAID = about(policy_of("bc", Spec(3, 2), AS_THEY_ARE)).written()


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "was not exported by deflow: its metadata lack the entry 'deflow'"),
        ({"deflow": "{}"}, "is damaged: what it says of itself cannot be read"),
        ({"deflow": "[" * 200_000}, "is damaged: what it says of itself cannot be read"),
        ({"deflow": "[1"}, "is damaged: what it says of itself cannot be read"),
        ({"deflow": SAID.replace('"spec": [3, 2', '"spec": [3, "x"')}, "is damaged: "),
        ({"deflow": SAID.replace('"format": 1', '"format": 2')}, "was written by another version of deflow"),
        (
            {"deflow": SAID},
            "is damaged: its graph has shapes {'a': (3,), 'b': (3,)}, and it says {'observations': (3,)",
        ),
    ],
)
def test_a_model_of_something_else(metadata: dict[str, str], says: str, tmp_path: Path) -> None:
    (tmp_path / "policy.onnx").write_bytes(identity(metadata, 3))
    with pytest.raises(UserError, match=re.escape(says)) as error:
        deflow.load(tmp_path / "policy.onnx")
    assert "\n" not in str(error.value)


def test_weights_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    for content, says in (
        (b"abc", "it is not a whole checkpoint"),
        (safetensors.torch.save({"a": torch.ones(1)}), "it lacks the entry 'deflow'"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"deflow": "[1"}), "it is not a whole checkpoint"),
        (safetensors.torch.save({"a": torch.ones(1)}, {"deflow": "[]"}), "is not a whole checkpoint: its entry"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(says)):
            deflow.load(path)
