"""Two processes train as one: the same gradient, the same weights, different data."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deflow.agents.deflow import DeFlow
from deflow.build import build_agent
from deflow.checkpoints import load_checkpoint
from deflow.distributed import max_over_ranks
from deflow.loggers import read_metrics
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.commands import run, start, tiny_overrides
from tests.conftest import compose_config

BATCH = 256
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class SummedLoss(nn.Module):
    def __init__(self, agent: DeFlow) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, batch: Any, noise: Any) -> torch.Tensor:
        return torch.stack([loss for _, loss, _ in self.agent.losses(batch, noise)]).sum()


def make_agent() -> DeFlow:
    torch.manual_seed(0)
    config = compose_config("networks.hidden=[16,16]")
    return build_agent(config.agent, Spec(5, 3))


def update(agent: DeFlow, module: nn.Module, batch: Any, noise: Any) -> dict[str, torch.Tensor]:
    """One backward, one Polyak step, one optimizer step; gradients and weights."""
    optimizer = agent.configure_optimizers()
    module(batch, noise).backward()
    agent.on_before_optimizer_step(optimizer)
    optimizer.step()
    found = {f"grad/{n}": p.grad for n, p in agent.named_parameters() if p.grad is not None}
    return found | {f"weight/{n}": p.detach() for n, p in agent.named_parameters()}


def one_rank(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    agent = make_agent().to(device)
    batch = random_batch(agent, BATCH)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))  # on the CPU, for any backend
    mine = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    batch = batch._replace(**{k: v[mine].to(device) for k, v in batch._asdict().items() if v is not None})
    noise = type(noise)(*(None if draw is None else draw[mine].to(device) for draw in noise))
    found = update(agent, DistributedDataParallel(SummedLoss(agent)), batch, noise)
    found["largest rank"] = max_over_ranks(torch.tensor(float(rank), device=device))
    torch.save({name: value.cpu() for name, value in found.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=TWO_GPUS)])
def test_two_halves_make_the_whole(backend: str, tmp_path: Path) -> None:
    # Every loss is a mean over the batch: with g_i the gradient of one sample, rank r computes the mean over its 128,
    # DDP averages the ranks: (1/2) (1/128 sum_{i<128} g_i + 1/128 sum_{i>=128} g_i) = 1/256 sum g_i.
    # The value term is -mean(Q) / scale with scale = mean |Q| over all 256: were it each rank's own mean, the two
    # halves would be weighted differently. The multiplier's gradient is -(mean da^2 - delta), again a mean.
    multiprocessing.set_forkserver_preload([__name__])  # or each rank imports everything for itself
    multiprocessing.start_processes(one_rank, args=(str(tmp_path), backend), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [found["largest rank"].item() for found in ranks] == [1, 1]
    agent = make_agent()
    batch = random_batch(agent, BATCH)
    whole = update(agent, SummedLoss(agent), batch, agent.draw_noise(batch, torch.Generator().manual_seed(0)))
    assert "grad/refiner.constraints.trust_region.log_multiplier" in whole
    for name, expected in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if name.startswith("grad") else {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(ranks[0][name], expected, **tolerance, msg=name)


@pytest.mark.parametrize("trainer", ["ddp_sim", pytest.param("ddp", marks=TWO_GPUS)])
@pytest.mark.parametrize("stages", ["offline_to_online", pytest.param("staged", marks=pytest.mark.slow)])
def test_two_processes_train(stages: str, trainer: str, point_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = (
        f"trainer={trainer}",
        "trainer.devices=2",
        f"stages={stages}",
        "online_updates=6",
        "eval.every=6",
        "eval.episodes=3",
    )
    result = run("train.py", *tiny_overrides(point_data, folder, *overrides))
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 12
    rows = [row for row in read_metrics(folder / "metrics.csv") if "eval/success" in row]
    expected = {"offline_to_online": [3, 3], "staged": [3]}  # split over the ranks, each played once
    assert [row["eval/episodes"] for row in rows] == expected[stages]
    if stages == "offline_to_online":
        # One step for each update, shared out: the first batch is drawn after one step on either rank.
        replays = [np.fromfile(folder / "replay" / f"online_{rank}.bin", np.float32) for rank in (0, 1)]
        numbers = 2 * 2 + 2 * 2 + 2  # of a transition; the newest waits for its next action
        assert [replay.size / numbers for replay in replays] == [2, 2]
        assert not np.array_equal(*replays)


@pytest.mark.slow
def test_processes_stop_together_and_end_with_the_main_one(point_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics, last = folder / "metrics.csv", folder / "checkpoints" / "0_joint" / "last.ckpt"
    settings = ("trainer=ddp_sim", "updates=1000000", "eval.every=1000000", "checkpoint_every=1000000")
    command = start("train.py", *tiny_overrides(point_data, folder, *settings))
    command.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5)
    command.send_signal(signal.SIGTERM)  # the main process alone
    assert command.wait() == 143
    assert command.output()[1].splitlines()[-1] == f"stopped by SIGTERM: go on by python train.py resume={folder}"
    step = load_checkpoint(last)["global_step"]
    assert step % 10 == 0

    command = start("train.py", f"resume={folder}")
    command.wait_for(lambda: read_metrics(metrics)[-1]["step"] > step + 20)
    command.send_signal(signal.SIGKILL)
    command.wait()
    command.wait_for_others()
