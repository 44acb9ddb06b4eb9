"""The commands' functions, called in the process of the test."""

from __future__ import annotations

from pathlib import Path

from deflow.distillation import distill
from deflow.evaluating import evaluate
from deflow.exporting import export
from deflow.inspection import inspect
from deflow.pipeline import train
from tests.conftest import CKPT, compose_config, tiny_config


def call(name: str, run: Path, data: Path, out: Path, *more: str) -> object:
    """Call a command in this process with the files of `run`; whatever it creates elsewhere is in `out`."""
    ckpt = f"ckpt={run / CKPT}"
    if name == "evaluate":
        return evaluate(compose_config(ckpt, "episodes=1", *more, config_name="evaluate"))
    if name == "export":
        settings = (f"out={out / 'policy.safetensors'}", "format=torch", "episodes=0", *more)
        return export(compose_config(ckpt, *settings, config_name="export"))
    if name == "distill":
        settings = ("updates=1", "eval.episodes=1", "logger=csv", "agent.actor.hidden=[8]", "threads=1")
        settings += ("trainer.log_every_n_steps=1", *more)
        return distill(compose_config(ckpt, *settings, config_name="distill"), out)
    if name == "inspect_data":
        settings = ("task=pointmaze_medium", f"paths.data={data}", f"out={out}", "samples=2", *more)
        return inspect(compose_config(ckpt, *settings, config_name="inspect_data"))
    if name == "train ckpt":
        return train(tiny_config(data, "experiment=pointmaze", ckpt, *more), out)
    return train(compose_config(f"resume={run}", *more), run)
