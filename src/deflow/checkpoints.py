"""Reading checkpoints: plain contents, the agent in them, its weights for another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.types import Spec


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's plain contents.

    Raises:
        UserError: if it is missing or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is not a checkpoint
        raise UserError(f"cannot read {path}: it is not a whole checkpoint") from error
    if "deflow" not in checkpoint:
        raise UserError(f"{path} is a checkpoint of something else: it lacks the entry 'deflow'")
    return checkpoint


def agent_of(checkpoint: dict[str, Any], **settings: Any) -> Agent:
    """The agent of a loaded checkpoint with its weights; `settings` replace those it was trained with.

    Raises:
        UserError: if the checkpoint holds several seeds.
    """
    card = checkpoint["deflow"]
    _refuse_several(card)
    agent = build_agent(card["config"]["agent"] | settings, Spec.of_list(card["spec"]))
    agent.load_state_dict(checkpoint["state_dict"])
    return agent


def load_weights(agent: Agent, path: Path, task: str) -> None:
    """Load the weights of a checkpoint of the same task and the same networks into `agent`.

    Raises:
        UserError: if it is of another task, its networks have other shapes, or it holds several seeds.
    """
    checkpoint = load_checkpoint(path)
    _refuse_several(checkpoint["deflow"])
    of = checkpoint["deflow"]["task"]
    if of != task:
        raise UserError(f"{path} is a checkpoint of {of}, not of {task}")
    try:
        agent.start_from(checkpoint)
    except RuntimeError as error:
        raise UserError(f"the networks of {path} differ from the configured ones: {error}") from error


def _refuse_several(card: dict[str, Any]) -> None:
    seeds = card["config"].get("seeds", 1)  # older ones hold one and do not say so
    if seeds > 1:
        first = card["config"]["seed"]
        raise UserError(f"the checkpoint holds {seeds} seeds: take one of those beside it, as seed_{first}.ckpt")
