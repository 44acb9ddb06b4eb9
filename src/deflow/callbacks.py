"""What happens beside the updates: evaluation, atomic checkpoints, the stage's clock, the progress bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from deflow.agents.base import Agent
from deflow.errors import UserError
from deflow.files import replacing
from deflow.online import OnlineStream

LAST = "last.ckpt"
FINAL = "final.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: a kill leaves the old checkpoint or the new one, never half."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            with replacing(target) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}; the checkpoint before it is whole") from error


class StageCheckpoint(ModelCheckpoint):
    """`last.ckpt` every `every` updates of a stage; `card` (plain values) goes into each checkpoint."""

    def __init__(self, folder: Path, every: int, card: dict[str, Any]) -> None:
        super().__init__(
            dirpath=folder,
            filename=LAST.removesuffix(".ckpt"),
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.card = card

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["deflow"] = self.card


class PeriodicEvaluation(Callback):
    """Calls `evaluate` every `every` updates of a stage and at its end, and logs the numbers it gives.

    Runs before checkpoints are written, so that a checkpoint never lacks the
    evaluation of its step.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]], every: int) -> None:
        self.evaluate, self.every = evaluate, every
        self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Agent)
        if trainer.global_step % self.every and trainer.global_step != trainer.max_steps:
            return
        started = time.perf_counter()
        metrics = {f"eval/{key}": value for key, value in self.evaluate().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=pl_module.run_step)
        self.seconds += time.perf_counter() - started


class OnlineProgress(Callback):
    """Logs, on the log interval of an online stage, what its episodes came to and where its batches come from.

    `online/share_of_batch` is the share of new transitions in the batches since the last row.
    """

    def __init__(self, stream: OnlineStream) -> None:
        self.stream = stream

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Agent)
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        collector, replay = self.stream.collector, self.stream.replay
        assert replay is not None
        metrics = {
            "online/episodes": float(collector.episodes),
            "online/transitions": float(replay.added),
            "online/share_of_batch": replay.drawn_new / replay.drawn,
        }
        replay.drawn, replay.drawn_new = 0, 0
        if collector.finished:
            episodes, collector.finished = collector.finished, []
            means = {"success": "success", "return": "episode_return", "length": "length"}
            metrics |= {f"online/{key}": mean(getattr(e, name) for e in episodes) for key, name in means.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=pl_module.run_step)


class StageClock(Callback):
    """Seconds spent on updates, validation left out; updates done in this process."""

    def __init__(self) -> None:
        self.seconds, self.updates = 0.0, 0
        self.first_update_at: float | None = None  # seconds since the epoch
        self._since: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.updates += 1
        if self.first_update_at is None:
            self.first_update_at = time.time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def _pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None


class SystemMetrics(Callback):
    """CPU, memory, disk and network use of this process's machine, as MLflow records them beside a run's metrics."""

    def __init__(self, logger: MLFlowLogger) -> None:
        self._logger = logger
        self._monitor: Any = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        self._monitor = SystemMetricsMonitor(
            self._logger.run_id, resume_logging=True, tracking_uri=self._logger._tracking_uri
        )
        self._monitor.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None


class StageProgress(RichProgressBar):
    """Rich's bar with the stage's name, updates/s and the agent's headline metrics."""

    def __init__(self, stage: str) -> None:
        super().__init__(refresh_rate=50)
        self.stage = stage

    def _get_train_description(self, current_epoch: int) -> str:
        return self.stage

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Any]:  # type: ignore[override]
        metrics = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in metrics.items() if key != "v_num"}
