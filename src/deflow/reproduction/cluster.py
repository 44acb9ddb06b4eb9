"""The runs of a plan as jobs of a cluster, by submitit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deflow.errors import UserError
from deflow.extras import require
from deflow.reproduction.plan import Job
from deflow.reproduction.runs import do, stop_running

log = logging.getLogger(__name__)

LONGEST_ARRAY = 1000  # jobs that SLURM takes in one array, unless its MaxArraySize is raised


class Work:
    """A run as a job: what submitit calls on a node, and once more after a preemption or the end of the job's time.

    Args:
        job: the run.
        threads: of torch.
    """

    def __init__(self, job: Job, threads: int) -> None:
        self.job, self.threads = job, threads

    def __call__(self) -> str | None:
        """Begin the run or go on with it; what is to be said of it, unless it is done."""
        return do(self.job, self.threads, apart=True)

    def checkpoint(self) -> Any:
        """Before the job ends: let the run write a checkpoint; the same again is what is queued next."""
        from submitit.helpers import DelayedSubmission

        stop_running()
        return DelayedSubmission(self)


class Cluster:
    """Where jobs are submitted.

    Args:
        folder: for what submitit writes.
        at_once: jobs that run side by side.
        threads: of torch, in each.
        name: submitit's name of the cluster, `slurm` or `local`.
        options: of submitit's `AutoExecutor`.
        max_timeouts: how often a run whose job ran out of time is queued again.

    Raises:
        UserError: if submitit is missing, there is no such cluster here, or it does not take an option.
    """

    def __init__(
        self, folder: Path, at_once: int, threads: int, name: str, options: Mapping[str, Any], max_timeouts: int
    ) -> None:
        require(f"engine.cluster={name}", "submitit")
        import submitit

        given = {key: value for key, value in options.items() if value is not None}
        limits = {f"{cluster}_max_num_timeout": max_timeouts for cluster in ("slurm", "local")}
        try:
            self._executor = submitit.AutoExecutor(folder, name, **limits)
            self._executor.update_parameters(**given, slurm_array_parallelism=at_once)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"no jobs can be submitted to {name} here: {reason}") from error
        self._threads, self._at_once = threads, at_once

    def run_all(self, jobs: Sequence[Job]) -> list[str]:
        """Submit what is not done yet as an array, and wait for it; so many jobs after so many.

        Returns:
            What is to be said of those that are not done now.
        """
        from submitit.core.utils import FailedJobError

        todo = [job for job in jobs if job.state != "done"]
        together = self._at_once if self._executor.cluster == "local" else LONGEST_ARRAY
        said: list[str] = []
        for first in range(0, len(todo), together):
            group = todo[first : first + together]
            try:
                submitted = self._executor.submit_array([Work(job, self._threads) for job in group])
            except (FailedJobError, OSError) as error:  # and what comes after would fare no better
                reason = " ".join(str(error).split())
                return [*said, f"{len(todo) - first} runs could not be submitted ({reason})"]
            log.info("submitted %d jobs from %s on; they go on if this command ends", len(group), submitted[0].job_id)
            outcomes = [_outcome(job, done) for job, done in zip(group, submitted, strict=True)]
            said += [outcome for outcome in outcomes if outcome is not None]
        return said


def _outcome(job: Job, submitted: Any) -> str | None:
    """Wait for it; what is to be said of the run, unless it is done."""
    from submitit.core.utils import UncompletedJobError

    try:
        said: str | None = submitted.result()
    except UncompletedJobError:  # or it raised: FailedJobError is one
        said = f"{job.name} ended without a result, see {submitted.paths.stderr}"
    return None if job.state == "done" else said
