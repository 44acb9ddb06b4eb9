"""`distill.py`: a one-step generator of a trained policy, and both of them side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from deflow.agents.base import Agent
from deflow.checkpoints import agent_of, load_checkpoint, units_of
from deflow.config import plain
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.evaluating import play
from deflow.evaluation.latency import latency
from deflow.invocation import typed
from deflow.pipeline import Again, train
from deflow.policy import Policy
from deflow.report import write_json
from deflow.run_folder import CHECKPOINTS, FINAL
from deflow.sections import AUTO
from deflow.trust import trust_only

DISTILL = partial(typed, "distill")


def distill(config: DictConfig, folder: Path, again: Again = DISTILL) -> dict[str, Any]:
    """Train the one-step policy in `folder`, a run like any other, and write `distillation.json` there.

    Args:
        config: of the command.
        folder: of the run.
        again: says by what command the run goes on if it is stopped.

    Returns:
        For `teacher` and `one_step`: what the evaluation came to, and the latency.

    Raises:
        UserError: if there is neither a checkpoint nor a run to go on with, the checkpoint is broken, or its policy
            cannot be distilled.
    """
    trust_only(config.trust)
    if config.resume is None and config.ckpt is None:
        raise UserError("name the policy to imitate, ckpt=PATH, or a distillation to go on with, resume=FOLDER")
    training = config if config.resume is not None else _training_config(config)
    train(training, folder, again)
    final = load_checkpoint(folder / CHECKPOINTS / "0_distillation" / FINAL)
    one_step = agent_of(final)
    trained = final["deflow"]["config"]
    source: Source = instantiate(trained["data"]["source"])
    settings = [trained["eval"][key] for key in ("episodes", "num_envs", "seed")]
    result: dict[str, Any] = {"ckpt": trained["ckpt"]}
    for name, agent in (("teacher", cast(Agent, one_step.teacher)), ("one_step", one_step)):
        policy = Policy(agent, units=units_of(final))
        result[name] = (play(policy, source, *settings) if source.has_env else {}) | latency(policy)
    write_json(folder / "distillation.json", result)
    _print(result)
    return result


def _training_config(command: DictConfig) -> DictConfig:
    """The configuration of the teacher's run with another agent and other stages."""
    config = plain(command)
    taught = load_checkpoint(config["ckpt"])["deflow"]["config"]
    teacher = taught["agent"] | config["teacher"] | {"_partial_": True}
    agent = config["agent"] | {"horizon": teacher.pop("horizon", 1), "teacher": teacher}
    of_command = ("name", "seed", "updates", "eval", "logger", "trainer", "paths", "ckpt", "threads", "trust")
    changed = {key: config[key] for key in of_command} | {"agent": agent, "resume": None}
    on_cpu = [trainer.get("accelerator") == "cpu" for trainer in (taught["trainer"], config["trainer"])]
    if on_cpu[0] != on_cpu[1]:
        changed["matmul_precision"] = AUTO  # what it was is that of the other kind of device
    stage = {"train": "all", "steps": config["updates"], "lr": config["lr"], "cosine_decay": True, "evaluate": True}
    return OmegaConf.create(taught | changed | {"stages": {"distillation": stage}})


def _print(result: dict[str, Any]) -> None:
    table = Table(title="one step against its teacher")
    for column in ("", "success", "95% interval", "latency p50", "p99"):
        table.add_column(column)
    for name in ("teacher", "one_step"):
        row = result[name]
        shares = "{success:.2f}", "{success_low:.2f} to {success_high:.2f}"
        success = [share.format(**row) if "success" in row else "-" for share in shares]
        times = [f"{row[key]:.2f} ms" for key in ("latency_ms_p50", "latency_ms_p99")]
        table.add_row(name.replace("_", " "), *success, *times)
    Console().print(table)
