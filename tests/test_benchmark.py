"""The benchmark runs, and ratios within one run stay where they were; absolute times are nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deflow.benchmark import benchmark, gflop, random_stream
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.timing import bfloat16_gain
from deflow.types import Spec
from tests.commands import run
from tests.conftest import compose_config

TINY = [
    "networks.hidden=[16,16]",
    "solver.steps=2",
    "rounds=1",
    "updates=2",
    "seeds=2",
    "evaluation.steps=5",
    "evaluation.episodes=2",
]


@pytest.mark.slow
def test_every_measurement(tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    small = ["evaluation.one_by_one_episodes=1", "task=pointmaze_medium"]
    # What is compiled, which takes most of the time, is the first agent in each precision.
    every = sorted(compose_config(config_name="benchmark").agents, key=lambda name: name != "flow_bc")
    small += ["precisions=[fp32]", "threads=1", f"agents={every}"]
    result = run("benchmark.py", *TINY, *small, f"out={out}", "--profile")
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    assert set(written["updates"]) == {*every}
    assert set(written["updates"]["deflow"]) == {"joint", "behavior", "extraction", "extraction_cached"}
    assert set(written["updates"]["fbrac"]) == {"joint"}
    assert written["startup"]["seconds_to_first_update"] > 0
    assert written["latency"]["ifql"]["latency_ms_p50"] > 0
    assert written["seeds"]["fp32"]["together"] > 0
    assert written["compile"]["fp32"]["compiled"] > 0
    assert written["online"]["online_over_offline"] > 0
    assert "aten::addmm" in result.stdout
    assert "ceiling" in result.stdout


def test_every_precision(tmp_path: Path) -> None:
    settings = ["measure=[ceiling,updates,seeds,sampling]", "agents=[deflow]", "precisions=[fp32,medium,bf16]"]
    config = compose_config(*TINY, *settings, f"out={tmp_path / 'benchmark.json'}", config_name="benchmark")
    result = benchmark(config)
    for name in ("ceiling", "seeds", "sampling"):
        assert set(result[name]) >= {"fp32", "medium", "bf16"}
    assert result["updates"]["deflow"]["joint"]["bf16_over_fp32"] > 0


def test_the_count_of_products() -> None:
    # A forward pass, and as much again for the gradients of the weights and of the inputs, but for the first inputs.
    agent = build_agent(compose_config("agent=flow_bc", *TINY, config_name="benchmark").agent, Spec(5, 3))
    stream = random_stream(agent, 32, 1, (0, "test"))
    layers = [9 * 16, 16 * 16, 16 * 3]
    assert gflop(agent, stream) == pytest.approx(2 * 32 * (3 * sum(layers) - layers[0]) / 1e9)


@pytest.mark.parametrize("more", [[], ["agent.path={mean: [0.0], std: [1.0]}"]])
def test_random_batches_are_what_an_agent_reads(more: list[str]) -> None:
    config = compose_config("agent=fql", "agent.horizon=4", *more, *TINY, config_name="benchmark")
    agent = build_agent(config.agent, Spec(5, 3))
    batch = random_stream(agent, 32, 1, (0, "test")).batch(0)
    assert batch.actions.shape == (32, 12)
    assert agent.traits.reads_path == (batch.path is not None)
    for _, loss, _ in agent.losses(batch, agent.noise(batch, "test")):
        assert loss.isfinite()


@pytest.mark.parametrize("override", ["measure=[updates,nonsense]", "precisions=[nonsense]"])
def test_unknown_names_are_refused_before_anything_is_measured(override: str) -> None:
    with pytest.raises(UserError, match="has unknown nonsense: choose among"):
        benchmark(compose_config(*TINY, override, config_name="benchmark"))


@pytest.mark.parametrize(("gain", "measured"), [(0.1, ["fp32", "medium"]), (2.0, ["fp32", "medium", "bf16"])])
def test_bf16_is_left_out_where_its_products_are_slow(
    gain: float, measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deflow.benchmark.bfloat16_gain", lambda: gain)
    with caplog.at_level("INFO"):
        result = benchmark(
            compose_config(*TINY, "measure=[ceiling]", f"out={tmp_path / 'b.json'}", config_name="benchmark")
        )
    assert result["precisions"] == list(result["ceiling"]) == measured
    assert ("bf16 is left out" in caplog.text) == ("bf16" not in measured)


@pytest.mark.slow
def test_ratios(tmp_path: Path) -> None:
    has_bfloat16 = bfloat16_gain() > 1
    precisions = "[fp32,bf16]" if has_bfloat16 else "[fp32]"
    settings = ["networks.hidden=[256,256,256]", "rounds=5", "updates=8", "threads=1", "agents=[deflow]"]
    settings += ["measure=[updates,lightning]", f"precisions={precisions}"]
    config = compose_config(*settings, config_name="benchmark")
    config.out = str(tmp_path / "benchmark.json")
    threads = torch.get_num_threads()
    try:
        result = benchmark(config)
    finally:
        torch.set_num_threads(threads)
    stages = result["updates"]["deflow"]
    assert stages["extraction_cached"]["over_solved_fp32"] > 1.2
    assert result["lightning"]["lightning_over_bare"] < 1.5
    if has_bfloat16:
        assert stages["joint"]["bf16_over_fp32"] > 1.0
