"""How fast updates are, and what Lightning's loop adds to them."""

from __future__ import annotations

import logging
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from omegaconf import DictConfig
from rich.console import Console
from torch.utils.data import DataLoader

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.callbacks import StageClock
from deflow.data.datamodule import BatchStream
from deflow.data.transitions import Transitions
from deflow.pipeline import LIGHTNING_WARNINGS
from deflow.report import write_json
from deflow.seeding import torch_generator
from deflow.types import Spec

ROWS = 100_000


def benchmark(config: DictConfig) -> dict[str, Any]:
    """Time the joint update in a bare loop and under Lightning's Trainer, in turns; print and write JSON.

    Both draw the same batches and noise, compute the same losses and take the same optimizer and Polyak steps. They
    take turns, so that a machine that slows down slows both; the overhead is the median of the rounds' ratios.
    """
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    agent = build_agent(config.agent, Spec(config.observation_dim, config.action_dim))
    stream = BatchStream(
        random_transitions(agent.spec), config.batch_size, 0, config.updates, (config.seed, "benchmark")
    )
    bare_seconds(agent, stream)  # warm-up
    rounds = [
        (bare_seconds(agent, stream), lightning_seconds(agent, stream, config.log_every)) for _ in range(config.rounds)
    ]
    bare, lightning = (median(seconds) / config.updates for seconds in zip(*rounds, strict=True))
    result = {
        "agent": type(agent).__name__,
        "hidden": list(config.networks.hidden),
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "matmul_precision": config.matmul_precision,
        "bare_updates_per_second": 1 / bare,
        "lightning_updates_per_second": 1 / lightning,
        "lightning_over_bare": median(b / a for a, b in rounds),
        "rounds_seconds": [list(pair) for pair in rounds],
        "torch": version("torch"),
        "lightning": version("lightning"),
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out), result)
    Console().print_json(data={key: value for key, value in result.items() if key != "rounds_seconds"})
    return result


def bare_seconds(agent: Agent, stream: BatchStream) -> float:
    """Seconds of one pass over `stream` in the smallest loop that computes the same updates."""
    optimizer = agent.configure_optimizers()
    started = time.perf_counter()
    for number, batch in enumerate(stream):
        generator = torch_generator(agent.device, 0, "noise", number)
        loss = torch.stack([loss for _, loss, _ in agent.losses(batch, agent.draw_noise(batch, generator))]).sum()
        optimizer.zero_grad()
        loss.backward()
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()
    return time.perf_counter() - started


def lightning_seconds(agent: Agent, stream: BatchStream, log_every: int) -> float:
    """Seconds of the same pass under a Trainer as the pipeline builds it."""
    clock = StageClock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=stream.last,
        max_epochs=1,
        log_every_n_steps=log_every,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    with warnings.catch_warnings():
        for message in (*LIGHTNING_WARNINGS, ".*no `val_dataloader`"):
            warnings.filterwarnings("ignore", message)
        trainer.fit(agent, DataLoader(stream, batch_size=None))
    return clock.seconds


def random_transitions(spec: Spec) -> Transitions:
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.standard_normal((ROWS, spec.observation_dim)),
        "actions": rng.uniform(-1, 1, (ROWS, spec.action_dim)),
        "rewards": -np.ones(ROWS),
        "masks": np.ones(ROWS),
        "valids": np.ones(ROWS),
    }
    return Transitions.from_compact(arrays, "random data")
