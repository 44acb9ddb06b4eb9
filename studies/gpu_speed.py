"""How fast updates are on a GPU: every agent and stage, kernel by kernel, recorded, compiled, beside JAX.

python studies/gpu_speed.py [key=value ...]    prints a table and writes JSON; needs no data, simulator or network

The settings are those of `benchmark.py`, such as agents=[deflow,fql] networks.hidden=[256,256,256] out=FILE, and what
to measure alone: kinds=eager,recorded,compiled,jax subjects=joint,extraction_cached,seeds,pixels. Without a GPU the
study runs on the CPU, which shows that it runs, and no more.

Before recorded updates are timed, the same ones are made kernel by kernel and recorded: `differing` counts the tensors
that are not the same bits after the two.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from deflow.agents.base import Agent, whole
from deflow.agents.graphed_update import GraphedUpdate, keep_rates_on
from deflow.agents.seed_stack import SeedStack
from deflow.benchmark import DISCOUNT, gflop, make_agent, random_stream, random_transitions, span_of, stages_of
from deflow.config import CONFIG_DIR
from deflow.data.memory.transitions import Transitions
from deflow.data.streams import BatchStream, SeedStream, Stream
from deflow.one_launch import WARM_UPS
from deflow.precision import set_product_precision
from deflow.report import write_json
from deflow.training import MOST_AT_ONCE
from deflow.types import Block, Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {"fp32": ("highest", False), "tf32": ("high", False), "bf16": ("high", True)}
COMPILED = ("deflow", "fql")  # agents whose compiled updates are measured, unless subjects= says of what
COMPARED = 50  # recorded updates after which weights are compared with those made kernel by kernel
FEW = 20  # updates so few that the device's queue cannot hold the host up
IMAGE, IMAGE_ROWS = (3, 64, 64, 3), 3_000  # frames, height, width and channels of an observation


Subject = tuple[Agent, Stream, Callable[[], None]]  # with what begins the agent's stage


@dataclass
class Row:
    """One line of the table; updates are those of all seeds, everything else is of one update."""

    agent: str
    stage: str
    precision: str
    kind: str
    updates_per_second: float
    host_ms: float
    kernels: int
    launches: int
    memory_mib: float
    differing: int | None  # tensors whose bits recorded updates make otherwise; None where that was not compared
    share: float  # of the card's own ceiling for products of that precision


def main(words: Sequence[str]) -> None:
    own = dict(word.split("=", 1) for word in words if word.startswith(("kinds=", "subjects=")))
    overrides = [word for word in words if not word.startswith(("kinds=", "subjects="))]

    def chosen(name: str, among: str) -> bool:
        return among not in own or name in own[among].split(",")

    with initialize_config_dir(CONFIG_DIR, version_base=None):
        configs = {
            name: compose("benchmark", [f"agent={name}", *overrides]) for name in compose("benchmark", overrides).agents
        }
    first = next(iter(configs.values()))
    torch.backends.cudnn.deterministic = True  # as in training
    ceilings = {precision: ceiling(precision) for precision in PRECISIONS}
    rows: list[Row] = []

    def add(*described: Any, of: Callable[[], dict[str, Any]]) -> None:
        try:
            measured = of()
        except Exception as error:  # one agent's failure is not the others'
            print(*described, f"FAILED: {error}", flush=True)
            return
        tflops = measured.pop("gflop") * measured["updates_per_second"] / 1e3
        rows.append(Row(*described, **(measured | {"share": tflops / ceilings[described[2]]})))
        print(*described, f"{measured['updates_per_second']:.0f}", flush=True)

    spec = Spec(first.observation_dim, first.action_dim)
    for name, config in configs.items():
        for subject, make in subjects_of(config, name, spec, overrides).items():
            if not chosen(subject, "subjects"):
                continue
            agent, stream, begin = make()
            begin()
            ways = [kind for kind in ("eager", "recorded", "compiled") if chosen(kind, "kinds")]
            if agent.unrecordable or (name not in COMPILED and "subjects" not in own):
                ways = [kind for kind in ways if kind == "eager" or (kind == "recorded" and not agent.unrecordable)]
            for kind in ways:
                if kind == "compiled":
                    agent.compile_losses()
                for precision in config.precisions or ("tf32",):
                    timed = partial(measure, config, agent, stream, begin, precision, kind)
                    add(name, subject, precision, kind, of=timed)
    if chosen("jax", "kinds") and find_spec("jax"):
        add("jax", "joint", "tf32", "jit", of=partial(in_jax, configs.get("deflow", first), spec))
    show(rows, ceilings)
    write_json(
        Path(first.out),
        {
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "hidden": list(first.networks.hidden),
            "tflops": ceilings,
            "rows": [asdict(row) for row in rows],
        },
    )


def differing(agent: Agent, stream: Stream, begin: Callable[[], None]) -> list[str]:
    """The tensors that are not the same bits after recorded updates as after those kernel by kernel."""
    start = {name: weight.clone() for name, weight in agent.state_dict().items()}
    results = []
    for recorded in (False, True):
        agent.load_state_dict(start)
        begin()
        run = updater(agent, recorded)
        for number, drawn in zip(range(WARM_UPS + 1 + COMPARED), on_device(stream), strict=False):
            run(number, drawn)
        results.append({name: weight.clone() for name, weight in agent.state_dict().items()})
    begin()
    if all(torch.equal(weight, results[0][name]) for name, weight in start.items()):
        raise RuntimeError("the updates move nothing, so that recorded ones cannot differ")
    return [name for name in start if not torch.equal(results[0][name], results[1][name])]


def updater(agent: Agent, recorded: bool) -> Callable[[int, Any], Any]:
    """What makes update `number` of the agent's stage with a batch."""
    optimizer = agent.configure_optimizers()
    keep_rates_on(DEVICE, optimizer)  # as the recorded one does
    whole_update: Callable[[Any], Any] = (
        GraphedUpdate(agent, optimizer)
        if recorded and DEVICE.type == "cuda"
        else lambda batch: agent.update(optimizer, whole(batch))
    )

    def run(number: int, batch: Any) -> None:
        agent.begin_update(number)
        agent.seed_noise("noise", number)
        whole_update(batch)

    return run


def on_device(stream: Stream) -> Iterator[Any]:
    """The stream's batches as they come to an update in training."""
    if DEVICE.type == "cpu":
        yield from stream
        return
    stream.at_once = MOST_AT_ONCE
    for block in stream:
        assert isinstance(block, Block)
        yield from block._replace(choices=block.choices.pin_memory().to(DEVICE, non_blocking=True)).one_by_one()


def measure(
    config: DictConfig, agent: Agent, stream: Stream, begin: Callable[[], None], precision: str, kind: str
) -> dict[str, Any]:
    """All of a `Row` but its share, and what products an update takes."""
    matmul, autocast = PRECISIONS[precision]
    set_product_precision(matmul)
    # Without its cache, as in training: weights that have changed are converted anew.
    in_precision = partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=autocast, cache_enabled=False)
    differ = None
    if kind == "recorded":
        with in_precision():
            differ = differing(agent, stream, begin)
        print("not the same bits:", ", ".join(differ[:3]) or "none", flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run, numbers = updater(agent, kind != "eager"), count()
    seeds = len(agent.agents) if isinstance(agent, SeedStack) else 1

    def loop(updates: int) -> tuple[float, float]:
        """Seconds until the host is through with so many updates, and until the device is."""
        batches = batches_of(stream, updates)
        synchronize()
        started = time.perf_counter()
        with in_precision():
            for batch in batches:
                run(next(numbers), batch)
        host = time.perf_counter() - started
        synchronize()
        return host, time.perf_counter() - started

    for _ in range(2 * period(agent)):
        loop(WARM_UPS + 1)
    host, _ = loop(FEW)
    seconds = [loop(config.updates)[1] for _ in range(config.rounds)]
    of_gpu, of_host = launches(partial(loop, period(agent))) if DEVICE.type == "cuda" else (0, 0)
    return {
        "updates_per_second": seeds * config.updates / median(seconds),
        "host_ms": 1e3 * host / FEW,
        "kernels": of_gpu // period(agent),
        "launches": of_host // period(agent),
        "memory_mib": torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0.0,
        "gflop": gflop(agent, stream) / seeds,
        "differing": None if differ is None else len(differ),
    }


def period(agent: Agent) -> int:
    """Updates after which the parts that are due are the same again."""
    return max(agent.every.values(), default=1)


def batches_of(stream: Stream, updates: int) -> Iterator[Any]:
    """So many batches; the stream's first ones again after its last."""
    made = 0
    while made < updates:
        for batch in on_device(stream):
            yield batch
            made += 1
            if made == updates:
                return


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def launches(loop: Callable[[], Any]) -> tuple[int, int]:
    """Kernels and copies that the GPU runs in the loop, and calls by which the host starts them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        loop()
    events = profiled.events() or []
    on_gpu = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    starts = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return on_gpu, sum(event.name.startswith(starts) for event in events)


def subjects_of(
    config: DictConfig, name: str, spec: Spec, overrides: Sequence[str]
) -> dict[str, Callable[[], Subject]]:
    """What is measured of an agent: each stage, the joint update of several seeds, and that of images."""
    agent = make_agent(config, name, spec).to(DEVICE)

    def of_stage(settings: dict[str, Any], stream: Stream, stage: str) -> Subject:
        alone = make_agent(config, name, spec).to(DEVICE)
        return alone, stream, partial(alone.begin_stage, stage, first_step=0, **settings)

    subjects: dict[str, Callable[[], Subject]] = {
        stage: partial(of_stage, *of, stage) for stage, of in stages_of(config, agent).items()
    }
    if not agent.uses_torchdiffeq:
        subjects["seeds"] = partial(several_seeds, config, name, spec)
    return subjects | {"pixels": partial(pixels, name, overrides)}


def several_seeds(config: DictConfig, name: str, spec: Spec) -> Subject:
    agents = [make_agent(config, name, spec) for _ in range(config.seeds)]
    data, numbers = random_transitions(agents[0]).on(DEVICE), range(config.seeds)
    drawn = span_of(agents[0])
    streams = [BatchStream(data, config.batch_size, 0, config.updates, (seed, "benchmark"), drawn) for seed in numbers]
    stack = SeedStack(agents).to(DEVICE)
    return stack, SeedStream(streams), partial(stack.begin_stage, "joint", "all", first_step=0)


def pixels(name: str, overrides: Sequence[str]) -> Subject:
    """Half of the batches are cropped."""
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose("benchmark", [f"agent={name}", "task=visual_cube_single", *overrides])
    spec = Spec(int(np.prod(IMAGE)), config.action_dim, image=IMAGE)
    agent = make_agent(config, name, spec).to(DEVICE)
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.integers(0, 256, (IMAGE_ROWS, *IMAGE[1:]), dtype=np.uint8),
        "actions": rng.uniform(-1, 1, (IMAGE_ROWS, spec.action_dim)),
        "rewards": -np.ones(IMAGE_ROWS),
        "masks": np.ones(IMAGE_ROWS),
        "valids": np.arange(1, IMAGE_ROWS + 1) % 200 != 0,
    }
    data = Transitions.from_compact(arrays, "random images", frames=IMAGE[0])
    data = (data.with_returns(DISCOUNT) if agent.traits.reads_returns else data).on(DEVICE)
    stream = BatchStream(
        data, config.batch_size, 0, config.updates, (0, "pixels"), span_of(agent), crop_probability=0.5
    )
    return agent, stream, partial(agent.begin_stage, "joint", "all", first_step=0)


def in_jax(config: DictConfig, spec: Spec) -> dict[str, Any]:
    """DeFlow's joint update of `jax_speed.py` on the same device, its batches there beforehand."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has its share of the memory already
    import jax
    import optax
    from jax_speed import LEARNING_RATE, arrays, make_update, state_of

    if (found := jax.default_backend()) != ("gpu" if DEVICE.type == "cuda" else "cpu"):
        raise RuntimeError(f"JAX computes on '{found}' here, and torch on '{DEVICE.type}'")
    agent = make_agent(config, "deflow", spec)
    optimizer = optax.adam(LEARNING_RATE)
    state = state_of(agent)
    state["moments"] = optimizer.init(state["parameters"])
    update = make_update(optimizer)
    data = random_stream(agent, config.batch_size, FEW, (0, "jax"))
    batches = [arrays(data.batch(number)) for number in range(FEW)]
    keys = [jax.random.key(number) for number in range(FEW)]

    def loop(updates: int) -> tuple[float, float]:
        nonlocal state
        started = time.perf_counter()
        for number in range(updates):
            state, _ = update(state, batches[number % FEW], keys[number % FEW])
        host = time.perf_counter() - started
        jax.block_until_ready(state)
        return host, time.perf_counter() - started

    loop(FEW)
    host, _ = loop(FEW)
    seconds = [loop(config.updates)[1] for _ in range(config.rounds)]
    operations = gflop(agent, data)
    speed = config.updates / median(seconds)
    return {"updates_per_second": speed, "host_ms": 1e3 * host / FEW, "kernels": 0, "launches": 0} | {
        "memory_mib": 0.0,
        "gflop": operations,
        "differing": None,
    }


def ceiling(precision: str) -> float:
    """TFLOP/s of one large product."""
    matmul, in_bfloat16 = PRECISIONS[precision]
    set_product_precision(matmul)
    size, dtype = (8192 if DEVICE.type == "cuda" else 512), torch.bfloat16 if in_bfloat16 else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))

    def seconds() -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b)
        synchronize()
        return (time.perf_counter() - started) / 5

    return 2 * size**3 / median([seconds() for _ in range(4)][1:]) / 1e12


def show(rows: Sequence[Row], ceilings: dict[str, float]) -> None:
    print("\nceiling, TFLOP/s: " + ", ".join(f"{name} {value:.3g}" for name, value in ceilings.items()))
    columns = "agent", "stage", "products", "kind", "updates/s", "host ms", "kernels", "launches", "MiB"
    print("\n| " + " | ".join((*columns, "differing", "of the ceiling")) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for row in rows:
        print(
            f"| {row.agent} | {row.stage} | {row.precision} | {row.kind} | {row.updates_per_second:.0f} | "
            f"{row.host_ms:.2f} | {row.kernels} | {row.launches} | {row.memory_mib:.0f} | "
            f"{'' if row.differing is None else row.differing} | {row.share:.1%} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
