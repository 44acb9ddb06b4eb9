"""How far a run has come, as its checkpoints say."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from deflow.checkpoints import OF_A_STAGE, TO_RESUME, load_checkpoint
from deflow.run_folder import CHECKPOINTS, FINAL, LAST


class Progress(NamedTuple):
    """How far a run has come, up to its newest checkpoint."""

    updates: int = 0  # over all stages
    seconds: float = 0.0  # that they took


def stage_folder(run_folder: Path, number: int, name: str) -> Path:
    """Where the checkpoints of a stage lie; stages are counted from 0."""
    return run_folder / CHECKPOINTS / f"{number}_{name}"


def saved_progress(config: DictConfig, folder: Path) -> Progress:
    """How far the run in `folder` has come."""
    progress = Progress()
    for number, name in enumerate(config.stages):
        checkpoints = stage_folder(folder, number, name)
        final, last = checkpoints / FINAL, checkpoints / LAST
        if not (final.exists() or last.exists()):
            break
        checkpoint = load_checkpoint(final, OF_A_STAGE) if final.exists() else load_checkpoint(last, TO_RESUME)
        progress = Progress(progress.updates + int(checkpoint["global_step"]), checkpoint["deflow"]["seconds"])
        if not final.exists():
            break
    return progress


def is_in_last_stage(config: DictConfig, folder: Path) -> bool:
    """Whether a checkpoint holds all that is still needed: what began with other weights can do without them then."""
    checkpoints = stage_folder(folder, len(config.stages) - 1, list(config.stages)[-1])
    return any((checkpoints / file).exists() for file in (FINAL, LAST))
