"""What happens beside the updates: evaluation, atomic checkpoints, the stage's clock, the progress bar."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from deflow import distributed, signals
from deflow.agents.base import Agent
from deflow.agents.graphed_update import GraphedUpdate
from deflow.errors import UserError
from deflow.files import replacing
from deflow.online import OnlineStream
from deflow.run_folder import FINAL, LAST
from deflow.signals import Stopped
from deflow.tracking import Tracker

log = logging.getLogger(__name__)

SAMPLING_SECONDS = 10.0  # between rows of system metrics, unless MLflow's own variable says otherwise

AGREE_EVERY = 10  # updates after which several processes ask each other whether one of them was asked to stop


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: a kill leaves the old checkpoint or the new one, never half."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            with replacing(target) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}; the checkpoint before it is whole") from error


class BetweenUpdates(Callback):
    """What is due between two updates: evaluation, checkpoint, and the end of a run that was asked to stop.

    Everything of the update before is then done and logged, and nothing of the next has begun, so `metrics.csv` holds
    all that comes before a checkpoint, whenever a kill comes. Lightning has no hook there (its last one comes before
    the log row and the validation), so the stream of batches calls this object when the next batch is asked for.

    At the end of the stage `final.ckpt` is written, and then the last evaluation made: an evaluation that a kill cut
    off is made up for when the run goes on.

    Args:
        folder: of the stage's checkpoints.
        checkpoint_every: updates between checkpoints.
        described: gives plain values that go into each checkpoint.
        finish: what else is written before `final.ckpt`; gives what goes into it beside them.
        clock: stands still meanwhile.
        evaluate: gives the numbers of an evaluation; None: the stage is not evaluated.
        evaluate_every: updates between evaluations.
        evaluated: whether the evaluation at a step of the run is in the log.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint_every: int,
        described: Callable[[], dict[str, Any]],
        finish: Callable[[], dict[str, Any]],
        clock: StageClock,
        evaluate: Callable[[], dict[str, float]] | None,
        evaluate_every: int,
        evaluated: Callable[[int], bool],
    ) -> None:
        self._folder, self._checkpoint_every = folder, checkpoint_every
        self._described, self._finish, self._clock = described, finish, clock
        self._evaluate, self._evaluate_every, self._evaluated = evaluate, evaluate_every, evaluated
        self._final: dict[str, Any] = {}
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        signals.take_over()
        if trainer.global_step:  # of a run that goes on: an evaluation may have been cut off
            self._evaluate_if_due()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning's own count, by which it logs, is one too high after a checkpoint that followed a validation.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def __call__(self) -> None:
        assert self._trainer is not None
        step = self._trainer.global_step
        stop = None if distributed.world_size() > 1 and step % AGREE_EVERY else asked_to_stop()
        if stop is None:
            try:
                self._evaluate_if_due()
            except Stopped as cut:
                stop = cut.number
        if stop is not None or step % self._checkpoint_every == 0:
            self._clock.pause()
            self._trainer.save_checkpoint(self._folder / LAST)
        if stop is not None:
            raise Stopped(stop, agreed=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause()
        if trainer.global_step != trainer.max_steps:  # Lightning has ways to end early
            raise UserError(f"the stage ended after {trainer.global_step} of {trainer.max_steps} updates")
        self._final = self._finish()
        trainer.save_checkpoint(self._folder / FINAL)
        self._evaluate_if_due()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["deflow"] = self._described() | self._final

    def _evaluate_if_due(self) -> None:
        trainer = self._trainer
        assert trainer is not None
        due = trainer.global_step % self._evaluate_every == 0 or trainer.global_step == trainer.max_steps
        if self._evaluate is None or not due:
            return
        agent = trainer.lightning_module
        assert isinstance(agent, Agent)
        if distributed.of_main_process(self._evaluated(agent.run_step)):
            return
        self._clock.pause()
        # With several processes none may leave: the others would wait for its episodes.
        with signals.prompt() if distributed.world_size() == 1 else nullcontext():
            metrics = self._evaluate()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=agent.run_step)


def asked_to_stop() -> int | None:
    """The signal that this process, or with several any of them, has got; all must ask at the same time."""
    if distributed.world_size() == 1:
        return signals.pending()
    return max((number for number in distributed.gather_objects(signals.pending()) if number is not None), default=None)


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
            metrics |= {"online/return": mean(e.episode_return for e in episodes)}
            metrics |= {"online/length": mean(e.length for e in episodes)}
            successes = [e.success for e in episodes if e.success is not None]
            metrics |= {"online/success": mean(successes)} if successes else {}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=pl_module.run_step)


class UpdatesAsOneLaunch(Callback):
    """Lets the updates of a stage be recorded, see `GraphedUpdate`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Agent)
        pl_module.whole_update = GraphedUpdate(pl_module, trainer.optimizers[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Agent)
        pl_module.whole_update = None
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()  # gradients lie in the memory of the recordings, which is free now

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


class StageClock(Callback):
    """Seconds spent on updates alone; updates done in this process."""

    def __init__(self) -> None:
        self.seconds, self.updates = 0.0, 0
        self.first_update_at: float | None = None  # seconds since the epoch
        self._since: float | None = None
        self._before = 0  # updates of other processes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.updates = trainer.global_step - self._before
        if self.first_update_at is None:
            self.first_update_at = time.time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def pause(self) -> None:
        """Stand still until the next update."""
        if self._since is not None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what was launched is not done
            self.seconds += time.perf_counter() - self._since
            self._since = None


class SystemMetrics(Callback):
    """CPU, memory, disk and network use of this machine, sampled by MLflow's monitors, as rows of a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._stop = threading.Event()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        threading.Thread(target=self._sample, args=(_monitors(), pl_module), daemon=True).start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop.set()

    def _sample(self, monitors: list[Any], agent: Agent) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

        while not self._stop.wait(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SAMPLING_SECONDS):
            metrics: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            self._tracker.log_metrics(metrics, step=agent.run_step)


def _monitors() -> list[Any]:
    """MLflow's, one by one: what it runs them with asks the tracking server each time."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception as error:  # of whichever kind NVIDIA's library has, if there is one
        log.debug("no GPU is monitored: %s", error)
    return monitors


class StageProgress(RichProgressBar):
    """Rich's bar with the stage's name, updates/s and the agent's headline metrics."""

    def __init__(self, stage: str) -> None:
        super().__init__(refresh_rate=50)
        self.stage = stage

    def _get_train_description(self, current_epoch: int) -> str:
        return self.stage

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)  # not the block's first

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Any]:  # type: ignore[override]
        metrics = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in metrics.items() if key != "v_num"}
