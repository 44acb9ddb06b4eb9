"""What the studies' figures stand on, and is not in the package."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deflow.agents.srpo import SRPO
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.errors import UserError
from deflow.evaluation.open_loop import measure_transitions
from deflow.flow.schedules import vp_levels
from deflow.pipeline import train
from tests.commands import ROOT
from tests.conftest import tiny_config
from tests.evaluation.test_open_loop import Walk, walks


def test_products_in_float32_are_those_of_bfloat16_hardware() -> None:
    Float32Products = runpy.run_path(str(ROOT / "studies" / "float32_products.py"))["Float32Products"]
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)

    def of_layer() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    native = of_layer()
    with Float32Products():
        emulated = of_layer()
    assert [value.dtype for value in emulated] == [value.dtype for value in native]
    for ours, theirs in zip(emulated, native, strict=True):
        # One unit in the last of bfloat16's eight places: sums of another order may round to a neighbour.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))

    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with Float32Products():
        product = a @ b
    assert torch.equal(product, a @ b)  # others are left alone


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The study of mutations, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    return importlib.import_module("mutations")


def test_a_mutation_is_killed_or_survives(mutations: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sign.py").write_text("def sign(x):\n    return -1 if x < 0 else 1\n")
    (tmp_path / "test_sign.py").write_text("from sign import sign\n\n\ndef test_of_two():\n    assert sign(2) == 1\n")
    two = mutations.Mutation("of two", "sign.py", "x < 0", "x > 0", ["test_sign.py::test_of_two"])
    zero = mutations.Mutation("of zero", "sign.py", "x < 0", "x <= 0", ["test_sign.py"])
    for name, status, row in (
        ("two", 0, "| of two | sign.py | killed |"),
        ("zero", 1, "| of zero | sign.py | SURVIVED |"),
    ):
        assert mutations.main([name], [two, zero], tmp_path) == status
        assert capsys.readouterr().out.splitlines()[2:] == [row]
    assert "x < 0" in (tmp_path / "sign.py").read_text()  # only a copy was changed
    nowhere = mutations.Mutation("of none", "sign.py", "x == 0", "", ["test_sign.py"])
    with pytest.raises(UserError, match=r"'of none': sign.py has 'x == 0' 0 times and not once"):
        mutations.main([], [nowhere], tmp_path)
    with pytest.raises(UserError, match="no mutation's name holds three"):
        mutations.main(["three"], [two, zero], tmp_path)


def test_every_mutation_finds_its_line_and_its_tests(mutations: Any) -> None:
    for mutation in mutations.MUTATIONS:
        assert mutations.mutated(ROOT, mutation) != (ROOT / mutation.file).read_text()
        for test in mutation.tests:
            file, _, name = test.partition("[")[0].partition("::")
            assert f"def {name}(" in (ROOT / file).read_text() or not name, test


@pytest.mark.slow
def test_the_study_of_gpus_runs_without_one(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    settings = [
        "agents=[flow_bc]",
        "networks.hidden=[8]",
        "updates=2",
        "rounds=1",
        "seeds=2",
        "batch_size=8",
        "threads=1",
    ]
    chosen = ["kinds=eager,recorded", "subjects=joint,seeds", f"out={out}"]
    command = [sys.executable, str(ROOT / "studies" / "gpu_speed.py"), *settings, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert {(row["stage"], row["kind"]) for row in rows} == {
        (s, k) for s in ("joint", "seeds") for k in ("eager", "recorded")
    }
    assert [row["differing"] for row in rows if row["kind"] == "recorded"] == [0, 0]


@pytest.mark.usefixtures("rendered")
def test_futures_are_drawn(
    tiny_data: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))  # as for a script there
    main = runpy.run_path(str(ROOT / "studies" / "futures.py"))["main"]
    data = tiny_data("pointmaze-medium", "navigate") / "pointmaze-medium-navigate-v0.npz"
    main(tmp_path / "futures.png", data, updates=2, hidden=(8,))
    assert (tmp_path / "futures.png").stat().st_size > 10_000


@pytest.mark.usefixtures("rendered", "short_episodes")
def test_values_and_ways_through_a_maze_are_drawn(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "studies" / "maze_values.py"))["main"]
    main(tmp_path / "maze.png", [finished_run()])
    assert (tmp_path / "maze.png").stat().st_size > 10_000


@pytest.mark.usefixtures("rendered")
def test_models_of_several_runs_are_shown_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, noise in (("still", 0.0), ("wild", 0.4)):
        data = walks([60] * 2, noise=0.2)
        found = measure_transitions(Walk(noise), data, data, seed=0)
        (tmp_path / run).mkdir()
        whole = dict.fromkeys(("agent", "task", "seed", "seeds", "data", "protocol"))
        (tmp_path / run / "summary.json").write_text(json.dumps(whole | {"dynamics": found}))
    arguments = ["transitions.py", *map(str, (tmp_path / "models.png", tmp_path / "still", tmp_path / "wild"))]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "studies" / "transitions.py"), run_name="__main__")
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    names = ["nothing changes", *(f"{run}, {kind}" for run in ("still", "wild") for kind in ("sample", "sample, mean"))]
    assert rows == [f"| {name}" for name in names]
    assert (tmp_path / "models.png").stat().st_size > 10_000


def test_the_study_of_scores_measures_a_policy(
    tiny_data: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tiny_data("pointmaze-medium", "navigate")
    stages = [f"stages.{stage}.steps=1" for stage in ("behavior", "values", "policy")]
    settings = ("experiment=pointmaze", "agent=srpo", "agent.behavior.width=8", "agent.actor.normalise=false")
    train(tiny_config(data, *settings, "stages=srpo", *stages), tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    study = importlib.import_module("score")
    for name, small in {"SAMPLES": 2, "ODE_STEPS": 1, "DESCENT_STEPS": 1, "DRAWS": 2}.items():
        monkeypatch.setattr(study, name, small)
    (path,) = tmp_path.glob("checkpoints/*policy/final.ckpt")
    study.main([path], episodes=1)
    assert f"| {path} | 0.3 |" in capsys.readouterr().out

    # The objective that is descended in each state is the policy's.
    agent = agent_of(load_checkpoint(path))
    assert isinstance(agent, SRPO)
    agent.eval()
    observations = torch.randn(3, *agent.spec.observation_shape)
    actions = torch.rand(3, 2, requires_grad=True)
    times, z = 0.1 + 0.8 * torch.rand(6, 1), torch.randn(6, 2)
    agent.actor.forward = lambda _: actions.repeat_interleave(2, 0)  # type: ignore[method-assign]
    rows = observations.repeat_interleave(2, 0)
    loss, _ = agent.actor.loss(rows, times, z, agent.behavior, agent.critic.target_values)
    (expected,) = torch.autograd.grad(3 * loss, actions)
    found = study.Alternatives(agent).slope(observations, actions.detach(), times, z)
    torch.testing.assert_close(found, expected)


def test_samples_of_a_score_are_those_of_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    study = importlib.import_module("score")
    mean, deviation = torch.tensor([0.3, -0.2]), 0.1

    class OfGaussian:
        levels = staticmethod(vp_levels)

        def noise(self, _: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            signal, sigma = vp_levels(times)
            return sigma * (noisy - signal * mean) / (signal.square() * deviation**2 + sigma.square())

    found = study.sampled(OfGaussian(), torch.zeros(200, 1), torch.Generator().manual_seed(0), 2).flatten(0, 1)
    torch.testing.assert_close(found.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((2,), deviation), atol=0.015, rtol=0)
