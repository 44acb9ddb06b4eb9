"""How fast everything is: updates of every agent and stage, Lightning's share, sampling, evaluation, start-up."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from deflow.agents.base import Agent
from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent
from deflow.callbacks import StageClock
from deflow.collecting import Collector
from deflow.cores import set_threads
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.replay import Replay
from deflow.data.memory.transitions import Transitions
from deflow.data.streams import BatchStream, SeedStream, Stream
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.evaluation.latency import latency
from deflow.evaluation.rollout import Evaluator
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.online import OnlineStream
from deflow.policy import Policy
from deflow.report import write_json
from deflow.timing import bfloat16_gain, in_turns, product_seconds, ratio, seconds_of_updates
from deflow.training import EXPECTED_WARNINGS
from deflow.types import Lookahead, Spec

log = logging.getLogger(__name__)

ROWS, PROPOSALS = 100_000, 8
DISCOUNT = 0.99
PROFILED_UPDATES, PROFILED_ROWS = 20, 20
# How float32 products are computed, and whether layers are in bfloat16 altogether.
PRECISIONS = {"fp32": ("highest", False), "medium": ("medium", False), "bf16": ("highest", True)}

Stages = dict[str, tuple[dict[str, Any], BatchStream]]  # what `begin_stage` gets, and the batches


def benchmark(config: DictConfig) -> dict[str, Any]:
    """Measure what `config.measure` names; print tables and write JSON.

    Whatever is compared takes turns in one process, so that a machine that slows down slows all of it, and ratios are
    medians over the rounds.

    Raises:
        UserError: if `config.measure` or `config.precisions` has a name that is not known.
    """
    set_threads(config.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    spec = Spec(config.observation_dim, config.action_dim)
    agents = {name: make_agent(config, name, spec) for name in config.agents}
    first = next(iter(agents.values()))
    result: dict[str, Any] = {
        "hidden": list(config.networks.hidden),
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "lightning": version("lightning"),
    }
    measurements = {
        "ceiling": lambda: ceiling(config),
        "updates": lambda: {name: updates(config, agent) for name, agent in agents.items()},
        "lightning": lambda: lightning_overhead(config, first),
        "compile": lambda: compilation(config, spec),
        "seeds": lambda: several_seeds(config, spec),
        "sampling": lambda: sampling(config, first),
        "latency": lambda: {name: latency(Policy(agent)) for name, agent in agents.items()},
        "evaluation": lambda: evaluation(config),
        "online": lambda: online(config),
        "startup": lambda: startup(),
    }
    for setting, known in (("measure", measurements), ("precisions", PRECISIONS)):
        if unknown := sorted(set(config[setting] or ()) - set(known)):
            raise UserError(f"{setting} has unknown {', '.join(unknown)}: choose among {', '.join(known)}")
    if config.precisions is None:
        config.precisions = worthwhile_precisions()
    result["precisions"] = list(config.precisions)
    for name in config.measure:
        result[name] = measurements[name]()
    result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if config.profile:
        _print_profile(config, first)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.out), result)
    _print(result)
    return result


def worthwhile_precisions() -> list[str]:
    """All of `PRECISIONS`, but bf16 only where its products are not slower: elsewhere an update takes many seconds."""
    gain = bfloat16_gain()
    if gain >= 1:
        return list(PRECISIONS)
    log.info("bf16 is left out: a product in bfloat16 is %.2f times as fast as in float32 here", gain)
    return [name for name in PRECISIONS if name != "bf16"]


def ceiling(config: DictConfig) -> dict[str, float]:
    """GFLOP/s of the products that updates are made of: batch x width x width."""
    width, rows = max(config.networks.hidden), config.batch_size
    result = {}
    for name in config.precisions:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        with _precision(name):
            seconds = product_seconds(dtype, rows, width, repeats=200)
        result[name] = 2 * rows * width**2 / seconds / 1e9
    return result


def updates(config: DictConfig, agent: Agent) -> dict[str, Any]:
    """Updates/s of every stage in every precision, and their ratios: bf16 over fp32, cached proposals over solved."""
    stages = stages_of(config, agent)
    seconds = in_turns(stage_loops(config, agent, stages), config.rounds)

    result: dict[str, Any] = {}
    for stage, (settings, stream) in stages.items():
        agent.begin_stage(stage, first_step=0, **settings)
        result[stage] = {name: config.updates / median(seconds[stage, name]) for name in config.precisions}
        result[stage]["gflop"] = gflop(agent, stream)
        if {"fp32", "bf16"} <= set(config.precisions):
            result[stage]["bf16_over_fp32"] = ratio(seconds[stage, "fp32"], seconds[stage, "bf16"])
    if "extraction_cached" in stages:
        for name in config.precisions:
            pair = seconds["extraction", name], seconds["extraction_cached", name]
            result["extraction_cached"][f"over_solved_{name}"] = ratio(*pair)
    agent.begin_stage("joint", "all", first_step=0)
    return result


def stage_loops(config: DictConfig, agent: Agent, stages: Stages) -> dict[tuple[str, str], Callable[[], float]]:
    """For every stage and precision, what makes `config.updates` updates on random data and gives their seconds."""

    def seconds(stage: str, precision: str) -> float:
        settings, stream = stages[stage]
        agent.begin_stage(stage, first_step=0, **settings)
        with _precision(precision) as context:
            return seconds_of_updates(agent, stream, context)

    return {(stage, name): partial(seconds, stage, name) for stage in stages for name in config.precisions}


def stages_of(config: DictConfig, agent: Agent) -> Stages:
    """What `begin_stage` gets and the batches, of every stage in which the agent can train."""
    transitions = random_transitions(agent).on(agent.device)
    drawn = transitions, config.batch_size, 0, config.updates, (config.seed, "benchmark"), span_of(agent)
    cache = random_proposals(agent, PROPOSALS).to(agent.device)
    plain_stream, cached_stream = BatchStream(*drawn), BatchStream(*drawn, proposals=cache)
    stages: Stages = {"joint": ({"train": "all"}, plain_stream)}
    behavior = [part for part in agent.parts if part.startswith("behavior")]
    if behavior and not agent.traits.trains_jointly and len(agent.parts) > 1:
        frozen = {"train": "all", "freeze": behavior}
        stages |= {"behavior": ({"train": behavior}, plain_stream), "extraction": (frozen, plain_stream)}
        if agent.cached_flow is not None:
            stages["extraction_cached"] = (frozen, cached_stream)
    return stages


def lightning_overhead(config: DictConfig, agent: Agent) -> dict[str, float]:
    """The joint update in a bare loop and under Lightning's Trainer: same batches, noise, losses and steps."""
    stream = random_stream(agent, config.batch_size, config.updates, (config.seed, "bare"))
    loops = {
        "bare": lambda: seconds_of_updates(agent, stream),
        "lightning": lambda: lightning_seconds(agent, stream, config.log_every),
    }
    seconds = in_turns(loops, config.rounds)
    return {
        "bare_updates_per_second": config.updates / median(seconds["bare"]),
        "lightning_updates_per_second": config.updates / median(seconds["lightning"]),
        "lightning_over_bare": ratio(seconds["lightning"], seconds["bare"]),
    }


def compilation(config: DictConfig, spec: Spec) -> dict[str, Any]:
    """Joint updates/s of an agent as it is and of one whose losses are compiled, and what compiling takes."""
    agents = {kind: make_agent(config, config.agents[0], spec) for kind in ("eager", "compiled")}
    agents["compiled"].compile_losses()
    stream = random_stream(agents["eager"], config.batch_size, config.updates, (config.seed, "benchmark"))
    result: dict[str, Any] = {}
    for precision in config.precisions:
        with _precision(precision) as context:
            loops = {name: partial(seconds_of_updates, agent, stream, context) for name, agent in agents.items()}
            first = loops["compiled"]()
            seconds = in_turns(loops, config.rounds)
        result[precision] = {name: config.updates / median(of_loop) for name, of_loop in seconds.items()}
        result[precision]["compiled_over_eager"] = ratio(seconds["eager"], seconds["compiled"])
        result[precision]["compile_seconds"] = first - median(seconds["compiled"])
    return result


def several_seeds(config: DictConfig, spec: Spec) -> dict[str, Any]:
    """Joint updates/s of one seed alone and of several in one process, the updates of all counted."""
    agents = [make_agent(config, config.agents[0], spec) for _ in range(1 + config.seeds)]
    transitions, span = random_transitions(agents[0]), span_of(agents[0])
    streams = [
        BatchStream(transitions, config.batch_size, 0, config.updates, (seed, "benchmark"), span)
        for seed in range(config.seeds)
    ]
    competitors: dict[str, tuple[Agent, BatchStream | SeedStream]] = {
        "alone": (agents[0], streams[0]),
        "together": (SeedStack(agents[1:]), SeedStream(streams)),
    }
    result: dict[str, Any] = {"seeds": config.seeds}
    for precision in config.precisions:
        with _precision(precision) as context:
            loops = {
                name: partial(seconds_of_updates, *competitor, context) for name, competitor in competitors.items()
            }
            seconds = in_turns(loops, config.rounds)
        result[precision] = {
            "alone": config.updates / median(seconds["alone"]),
            "together": config.seeds * config.updates / median(seconds["together"]),
            "together_over_alone": config.seeds * ratio(seconds["alone"], seconds["together"]),
        }
    return result


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
        for message in (*EXPECTED_WARNINGS, ".*no `val_dataloader`"):
            warnings.filterwarnings("ignore", message)
        trainer.fit(agent, DataLoader(stream, batch_size=None))
    return clock.seconds


def sampling(config: DictConfig, agent: Agent) -> dict[str, float]:
    """Milliseconds in which the flow proposes an action for each state of a batch."""
    flow: BehaviorFlow = agent.behavior_flow  # type: ignore[assignment]
    observations = torch.randn(config.batch_size, agent.spec.observation_dim)
    z = torch.randn(config.batch_size, agent.spec.action_dim)
    result = {}
    for name in config.precisions:
        milliseconds = []
        for _ in range(config.rounds * 5):
            with _precision(name) as context, context:
                started = time.perf_counter()
                flow.propose(observations, z)
                milliseconds.append(1e3 * (time.perf_counter() - started))
        result[name] = median(milliseconds)
    return result


def evaluation(config: DictConfig) -> dict[str, float]:
    """Environment steps/s side by side and one by one with a batch of one, in the task's own environment."""
    name = ogbench.task_name(config.task.env, config.task.dataset, None)
    settings = config.evaluation
    policy = Policy(make_agent(config, config.agents[0], ogbench.spec_of(ogbench.make_env(name))))

    def steps_per_second(num_envs: int, episodes: int) -> float:
        evaluator = Evaluator(
            lambda: ogbench.make_env(name, max_episode_steps=settings.steps), episodes, num_envs, config.seed
        )
        evaluator.run(policy)  # makes the environments
        started = time.perf_counter()
        played = evaluator.run(policy)
        seconds = time.perf_counter() - started
        evaluator.close()
        return sum(episode.length for episode in played) / seconds

    one_by_one = steps_per_second(1, settings.one_by_one_episodes)
    batched = steps_per_second(settings.num_envs, settings.episodes)
    return {"steps_per_second": batched, "one_by_one": one_by_one, "batched_over_one_by_one": batched / one_by_one}


def online(config: DictConfig) -> dict[str, float]:
    """Joint updates/s on data alone, and with a step in the task's environment before each."""
    name = ogbench.task_name(config.task.env, config.task.dataset, None)
    spec = ogbench.spec_of(ogbench.make_env(name))
    agent = make_agent(config, config.agents[0], spec)
    data = random_transitions(agent)
    collector = Collector(lambda: ogbench.make_env(name), agent, 1, span_of(agent), lambda reward: reward, config.seed)
    draw = (config.seed, "benchmark"), span_of(agent)
    with tempfile.TemporaryDirectory() as folder:
        ring = Path(folder) / "replay.bin"
        streams = {
            "offline": BatchStream(data, config.batch_size, 0, config.updates, *draw),
            "online": OnlineStream(
                collector,
                lambda added: Replay(data, data.starts, spec, config.updates, ring, added=added),
                config.updates,
                1,
                None,
                *draw,
            ).start_at(0, config.batch_size),
        }
        loops = {kind: partial(seconds_of_updates, agent, stream) for kind, stream in streams.items()}
        seconds = in_turns(loops, config.rounds)
    collector.close()
    return {
        "offline_updates_per_second": config.updates / median(seconds["offline"]),
        "online_updates_per_second": config.updates / median(seconds["online"]),
        "online_over_offline": ratio(seconds["offline"], seconds["online"]),
    }


def startup() -> dict[str, float]:
    """Seconds from the start of `deflow train` to its first update, with data on disk and every default on."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        arrays: dict[str, Any] = _random_arrays(Spec(observation_dim=29, action_dim=8))
        np.savez(data, **arrays, terminals=np.arange(1, ROWS + 1) % 1000 == 0)
        run = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "deflow",
            "train",
            "experiment=custom",
            f"data.source.path={data}",
            "updates=1",
        ]
        command += [f"hydra.run.dir={run}", f"paths.logs={folder}", "diversity.states=0"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return {"seconds_to_first_update": json.loads((run / "summary.json").read_text())["seconds_to_first_update"]}


def random_stream(
    agent: Agent, batch_size: int, updates: int, seed: tuple[int | str, ...], proposals: int | None = None
) -> BatchStream:
    """Batches of random numbers, with all that the agent reads, and so many cached proposals for each state."""
    cache = None if proposals is None else random_proposals(agent, proposals)
    return BatchStream(random_transitions(agent), batch_size, 0, updates, seed, span_of(agent), proposals=cache)


def random_proposals(agent: Agent, count: int) -> ProposalCache:
    """Random numbers in place of so many proposals for each state."""
    return ProposalCache(torch.rand(ROWS, count, agent.spec.action_dim).mul_(2).sub_(1).half())


def span_of(agent: Agent) -> Lookahead:
    """What a transition of the agent spans: single decisions."""
    horizon = agent.spec.horizon
    return Lookahead(DISCOUNT, horizon, horizon, agent.traits.reads_path)


def random_transitions(agent: Agent) -> Transitions:
    """Random numbers in place of data, with all that the agent reads of them."""
    arrays = _random_arrays(agent.spec) | {"masks": np.ones(ROWS), "valids": np.ones(ROWS)}
    data = Transitions.from_compact(arrays, "random data")
    return data.with_returns(DISCOUNT) if agent.traits.reads_returns else data


def _random_arrays(spec: Spec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((ROWS, spec.observation_dim), dtype=np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, spec.action_dim // spec.horizon)).astype(np.float32),
        "rewards": -np.ones(ROWS, np.float32),
    }


def make_agent(config: DictConfig, name: str, spec: Spec) -> Agent:
    """The agent of that name with whatever else the command line says."""
    if HydraConfig.initialized():
        config = compose("benchmark", overrides=[*HydraConfig.get().overrides.task, f"agent={name}"])
    torch.manual_seed(config.seed)
    return build_agent(config.agent, spec)


@contextmanager
def _precision(name: str) -> Iterator[AbstractContextManager]:
    """Products as `PRECISIONS` says; gives the autocast context that losses belong into."""
    matmul, autocast = PRECISIONS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        yield torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    finally:
        torch.set_float32_matmul_precision(before)


def gflop(agent: Agent, stream: Stream) -> float:
    """Products of one update, forward and backward."""
    batch = stream.batch(0)
    noise = agent.next_noise(batch)
    with _OperationCount() as counter:
        torch.stack([loss for _, loss, _ in agent.losses(batch, noise)]).sum().backward()
    return counter.operations / 1e9


class _OperationCount(TorchDispatchMode):
    """Counts what products take; torch's own counter follows modules too, which fails inside `torch.func.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        return result


def _print_profile(config: DictConfig, agent: Agent) -> None:
    """Where the time of the joint update goes, operation by operation."""
    stream = random_stream(agent, config.batch_size, PROFILED_UPDATES, (config.seed, "bare"))
    for name in config.precisions:
        with _precision(name) as context:
            seconds_of_updates(agent, stream, context)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                seconds_of_updates(agent, stream, context)
        print(f"{name}, {PROFILED_UPDATES} joint updates")
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILED_ROWS))


def _print(result: dict[str, Any]) -> None:
    console = Console()
    if "updates" in result:
        table = Table(title=f"updates/s, networks {result['hidden']}, {result['threads']} threads")
        for column in ("agent", "stage", *result["precisions"], "bf16 over fp32", "share of the ceiling"):
            table.add_column(column)
        for row in _rows(result):
            table.add_row(*row)
        console.print(table)
    console.print_json(data={key: value for key, value in result.items() if key != "updates"})


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    precisions = result["precisions"]
    for agent, stages in result["updates"].items():
        for stage, speed in stages.items():
            speeds = [f"{speed[name]:.1f}" for name in precisions]
            gain = f"{speed['bf16_over_fp32']:.2f}" if "bf16_over_fp32" in speed else "-"
            shares = "-"
            if "ceiling" in result:
                share = (speed[name] * speed["gflop"] / result["ceiling"][name] for name in precisions)
                shares = ", ".join(f"{value:.0%}" for value in share)
            yield agent, stage, *speeds, gain, shares
