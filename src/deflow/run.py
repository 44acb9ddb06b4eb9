"""Run: one training run, with all that is known of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from deflow.agents.base import Agent
from deflow.checkpoints import ALLOWED_STEPS, FORMAT
from deflow.config import plain
from deflow.data.datamodule import OfflineDataModule
from deflow.evaluation.rollout import Episode, Evaluator
from deflow.loggers import CsvMetrics
from deflow.policy import Policy
from deflow.tracking import Tracker
from deflow.units import Units


@dataclass
class Run:
    """One training run: its folder, its components and what is known of it so far."""

    folder: Path
    config: DictConfig
    resume: bool
    agents: list[Agent]  # one a seed, each of which can act
    learner: Agent  # what trains: the only agent, or all of them as one
    data: OfflineDataModule
    evaluator: Evaluator | None  # None: the data have no environment
    loggers: list[Any]
    metrics: CsvMetrics
    seconds_before: float = 0.0  # spent on the run by the processes before this one
    started: float = field(default_factory=time.perf_counter)
    first_update_at: float | None = None  # seconds since the epoch
    stage_speed: dict[str, float] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)  # of the last evaluation

    @property
    def seconds(self) -> float:
        """Spent on the run so far; what a kill undid is not counted."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def trackers(self) -> list[Tracker]:
        """What is logged to beside `metrics.csv`."""
        return [logger for logger in self.loggers if isinstance(logger, Tracker)]

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of itself, in plain values."""
        source = self.data.source
        of_task = {"task": source.task, "spec": list(self.agents[0].spec), "protocol": source.protocol()}
        allowed = self.agents[0].allowed_steps
        of_model = {} if allowed is None else {ALLOWED_STEPS: allowed}
        units = {key: value and list(value) for key, value in self.units._asdict().items()}
        return (
            {"format": FORMAT, "config": plain(self.config), "seconds": self.seconds, "units": units}
            | of_task
            | of_model
        )

    @property
    def units(self) -> Units:
        """What lies between the environment's numbers and the networks'."""
        assert self.data.transitions is not None
        return self.data.transitions.units

    def policy(self, agent: Agent) -> Policy:
        """The evaluation policy of one of the agents."""
        return Policy(agent, units=self.units)


def of_learning(stage: DictConfig) -> dict[str, Any]:
    """The keyword arguments of `Agent.begin_stage` in a stage's settings."""
    decay = stage.get("cosine_decay", False)  # of all parts, or of those in a list
    return {
        "train": stage.train,
        "freeze": stage.get("freeze", ()),
        "lr": stage.get("lr"),
        "cosine_decay_steps": stage.steps if decay else None,
        "decaying": "all" if decay in (True, False) else tuple(decay),
    }
