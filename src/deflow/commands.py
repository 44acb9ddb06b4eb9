"""The commands, as `deflow NAME` and as the scripts at the top of the repository start them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from deflow.command_line import refuse_other_overrides
from deflow.entry import entry_point
from deflow.imports import quick_imports
from deflow.invocation import started_by_console, typed_command


@entry_point("train")
def train(config: DictConfig, folder: Path) -> None:
    """Train, evaluate and report a policy: experiment=NAME, or resume=FOLDER to go on."""
    with quick_imports():
        from deflow import pipeline

    if config.resume is not None:
        refuse_other_overrides(HydraConfig.get().overrides.task)
    with _as_typed():
        pipeline.train(config, folder)


@entry_point("evaluate")
def evaluate(config: DictConfig, folder: Path) -> None:
    """Play a checkpoint's policy again: ckpt=PATH."""
    with quick_imports():
        from deflow import evaluating

    evaluating.evaluate(config)


@entry_point("serve")
def serve(config: DictConfig, folder: Path) -> None:
    """Let robots and other programs ask a policy, over a WebSocket: ckpt=PATH."""
    with quick_imports():
        from deflow.serving.serve import serve

    serve(config)


@entry_point("export")
def export(config: DictConfig, folder: Path) -> None:
    """Write a checkpoint's policy as one file for the robot: ckpt=PATH."""
    with quick_imports():
        from deflow import exporting

    exporting.export(config)


@entry_point("push")
def push(config: DictConfig, folder: Path) -> None:
    """Share a policy, on Hugging Face's hub or in MLflow's registry: ckpt=PATH to=ADDRESS."""
    with quick_imports():
        from deflow.sharing.push import push

    push(config)


@entry_point("generate")
def generate(config: DictConfig, folder: Path) -> None:
    """Make a data set with OGBench's own recipe: dataset=NAME out=FOLDER."""
    with quick_imports():
        from deflow.data.generate.runner import generate_dataset

    path = generate_dataset(
        config.dataset,
        config.episodes,
        Path(config.out),
        config.seed,
        config.workers,
        config.steps,
        config.overwrite,
    )
    print(f"wrote {path}")


@entry_point("inspect_data")
def inspect_data(config: DictConfig, folder: Path) -> None:
    """Write the card of a data set, with warnings for known faults: task=NAME."""
    with quick_imports():
        from deflow import inspection

    inspection.inspect(config)


@entry_point("distill")
def distill(config: DictConfig, folder: Path) -> None:
    """Train a one-step generator of a trained policy: ckpt=PATH, or resume=FOLDER to go on."""
    with quick_imports():
        from deflow import distillation

    if config.resume is not None:
        refuse_other_overrides(HydraConfig.get().overrides.task)
    with _as_typed():
        distillation.distill(config, folder)


@entry_point("benchmark")
def _benchmark(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.benchmark import benchmark

    benchmark(config)


def benchmark() -> None:
    """Measure how fast everything is, as tables and as JSON; --profile says where the time goes."""
    sys.argv[1:] = ["profile=true" if argument == "--profile" else argument for argument in sys.argv[1:]]
    _benchmark()


@entry_point("reproduce")
def reproduce(config: DictConfig, folder: Path) -> None:
    """Make a published table: the runs that are missing, then ours beside the papers': table=NAME."""
    with quick_imports():
        from deflow.reproduction.reproduce import reproduce

    reproduce(config)


@entry_point("train_expert")
def train_expert(config: DictConfig, folder: Path) -> None:
    """Train a walking ant like the one that makes the antmaze data."""
    with quick_imports():
        from deflow.data.generate.expert import train_expert

    train_expert(config.steps, Path(config.out), config.seed, config.episodes, config.overwrite)


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "serve": serve,
    "export": export,
    "push": push,
    "generate": generate,
    "inspect": inspect_data,
    "distill": distill,
    "benchmark": benchmark,
    "reproduce": reproduce,
    "train-expert": train_expert,
}


def console() -> None:
    """`deflow NAME [arguments]`: one of `COMMANDS`; without a name, or with --help, what there is."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(_listing())
        return
    if name not in COMMANDS:
        print(f"error: no command '{name}': choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    started_by_console(name)
    del sys.argv[1]  # Hydra reads what is left
    COMMANDS[name]()


def _listing() -> str:
    lines = (f"  {name:13}{command.__doc__}" for name, command in COMMANDS.items())
    return "\n".join(("deflow COMMAND [key=value ...]; deflow COMMAND --help shows what can be set.\n", *lines))


@contextmanager
def _as_typed() -> Iterator[None]:
    """Give `sys.argv` the name of the command again: by it Lightning starts the other processes of a run."""
    arguments = sys.argv[1:]
    sys.argv[1:1] = [typed_command()] if typed_command() else []
    try:
        yield
    finally:
        sys.argv[1:] = arguments
