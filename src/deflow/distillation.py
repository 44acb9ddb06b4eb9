"""`distill.py`: a one-step generator of a trained policy, and both of them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from deflow.checkpoints import agent_of, load_checkpoint
from deflow.config import plain
from deflow.data.source import Source
from deflow.evaluation.latency import latency
from deflow.pipeline import play, train
from deflow.report import write_json
from deflow.trust import trust_only


def distill(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the one-step policy in `folder`, a run like any other, and write `distillation.json` there.

    Returns:
        For `teacher` and `one_step`: what the evaluation came to, and the latency.

    Raises:
        UserError: if the checkpoint is broken, or its policy cannot be distilled.
    """
    trust_only(config.trust)
    card = load_checkpoint(Path(config.ckpt))
    train(_training_config(plain(config), card["deflow"]["config"]), folder)
    final = load_checkpoint(folder / "checkpoints" / "0_distillation" / "final.ckpt")
    result: dict[str, Any] = {"ckpt": str(config.ckpt)}
    source: Source = instantiate(card["deflow"]["config"]["data"]["source"])
    settings = config.eval.episodes, config.eval.num_envs, config.eval.seed
    for name, agent in (("teacher", agent_of(card, **plain(config.teacher))), ("one_step", agent_of(final))):
        result[name] = (play(agent, source, *settings) if source.has_env else {}) | latency(agent)
    write_json(folder / "distillation.json", result)
    _print(result)
    return result


def _training_config(config: dict[str, Any], taught: dict[str, Any]) -> DictConfig:
    """The configuration of the teacher's run with another agent and other stages."""
    teacher = taught["agent"] | config["teacher"] | {"_partial_": True}
    agent = config["agent"] | {"horizon": teacher.pop("horizon", 1), "teacher": teacher}
    own = ("name", "seed", "updates", "eval", "logger", "trainer", "paths", "ckpt", "threads", "trust")
    changed = {key: config[key] for key in own} | {"agent": agent, "resume": None}
    stage = {"train": "all", "steps": config["updates"], "lr": config["lr"], "cosine_decay": True, "evaluate": True}
    return OmegaConf.create(taught | changed | {"stages": {"distillation": stage}})


def _print(result: dict[str, Any]) -> None:
    table = Table(title="one step against its teacher")
    for column in ("", "success", "95% interval", "latency p50", "p99"):
        table.add_column(column)
    for name in ("teacher", "one_step"):
        row = result[name]
        success = [f"{row['success']:.2f}", f"{row['success_low']:.2f} to {row['success_high']:.2f}"]
        times = [f"{row[key]:.2f} ms" for key in ("latency_ms_p50", "latency_ms_p99")]
        table.add_row(name.replace("_", " "), *(success if "success" in row else ["-", "-"]), *times)
    Console().print(table)
