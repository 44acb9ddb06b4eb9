"""A tracker beside metrics.csv: it may fail, and neither ends nor stalls the training."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from deflow.description import Description

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 60.0  # between two attempts; the first is of a second, each twice as long as the one before
REFUSED_AFTER = 3  # failures in a row after which it is asked whether the tracker takes what comes next
BOUNDS = ("_low", "_high")  # of confidence intervals: no charts of their own, metrics.csv has them
FLUSH_SECONDS = 10.0  # without any delivery, after which the end of a run waits no longer


class Tracker(Logger):
    """Hands what is logged to another logger, in order, from a thread of its own.

    A failure is said once and tried again until it works or the run ends; what is refused while that which follows is
    taken is given up. Of all but the main process nothing is handed on.

    Args:
        logger: whose calls may be slow, and may raise anything.
        describe: tells the tracker what a run is; None: its settings and tags are its logger's hyperparameters.
        upload: puts a file into the tracker; None if it has no place for files.
        wants_system_metrics: whether rows of the machine's use belong into it.
    """

    def __init__(
        self,
        logger: Logger,
        describe: Callable[[Description], None] | None = None,
        upload: Callable[[Path], None] | None = None,
        wants_system_metrics: bool = False,
    ) -> None:
        super().__init__()
        self.logger = logger
        self.wants_system_metrics = wants_system_metrics
        self._describe, self._upload = describe, upload
        self._name, self._version = str(logger.name or ""), str(logger.version or "")  # asked for at every refresh
        self._waiting: deque[tuple[str, Callable[[], Any]]] = deque()  # what it is, and the call that delivers it
        self._changed = threading.Condition()  # guards what is waiting
        self._retry_now = threading.Event()
        self._failures = 0  # in a row
        self._refused: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._has_warned = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self._version

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._hand_on("settings:", lambda: self.logger.log_hyperparams(params, *args, **kwargs))

    @rank_zero_only
    def describe(self, description: Description) -> None:
        """Tell the tracker what the run is."""
        describe = self._describe
        if describe is None:
            self.log_hyperparams(description.tags | description.settings)
        else:
            self._hand_on("settings:", lambda: describe(description))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {key: float(value) for key, value in metrics.items() if not key.endswith(BOUNDS)}
        self._hand_on("rows:", lambda: self.logger.log_metrics(row, step))

    @rank_zero_only
    def log_artifact(self, path: Path) -> None:
        """Put a file into the tracker, if it has a place for files."""
        upload = self._upload
        if upload is not None:
            self._hand_on("files:", lambda: upload(path))

    @rank_zero_only
    def save(self) -> None:
        self._hand_on("", self.logger.save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._hand_on("", lambda: self.logger.finalize(status))
        if status != "success":  # the process may be about to end
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Wait until all is delivered, or nothing has been for `FLUSH_SECONDS`, and say what is not."""
        self._failures = 0
        self._retry_now.set()
        with self._changed:
            while self._waiting:
                left = len(self._waiting)
                if not self._changed.wait_for(lambda left=left: len(self._waiting) < left, FLUSH_SECONDS):  # type: ignore[misc]
                    break
            lost = self._refused + Counter(what for what, _ in self._waiting)
        counts = ", ".join(f"{what} {number}" for what, number in lost.items() if what)
        if counts:
            log.warning("%s lacks what the run's folder has (%s)", self._kind, counts)

    @property
    def _kind(self) -> str:
        return type(self.logger).__name__

    def _hand_on(self, what: str, call: Callable[[], Any]) -> None:
        with self._changed:
            self._waiting.append((what, call))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver_all, name="tracker", daemon=True)
            self._thread.start()

    def _deliver_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            if self._deliver(0):
                self._failures = 0
                continue
            self._failures += 1
            if self._failures >= REFUSED_AFTER and len(self._waiting) > 1 and self._deliver(1):
                if not self._deliver(0):  # once more: the tracker may just have come back
                    self._give_up()
                self._failures = 0
                continue
            self._retry_now.wait(min(2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE_SECONDS))
            self._retry_now.clear()

    def _deliver(self, place: int) -> bool:
        """Whether what waits at `place` was taken."""
        _, call = self._waiting[place]
        try:
            call()
        except Exception as error:  # a tracker may raise whatever its storage and its HTTP library do
            self._warn(error)
            return False
        with self._changed:
            del self._waiting[place]
            self._changed.notify_all()
        return True

    def _give_up(self) -> None:
        """The first that waits is what the tracker does not take: it has taken the one after it."""
        with self._changed:
            what, _ = self._waiting.popleft()
            self._refused[what] += 1
            self._changed.notify_all()

    def _warn(self, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        log.warning("%s fails (%s): training goes on and tries again; metrics.csv has every row", self._kind, reason)
