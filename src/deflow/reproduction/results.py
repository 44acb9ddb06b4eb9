"""Results: a run in one line, with all that decides what it may be compared with."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deflow.command_line import one_way
from deflow.errors import UserError
from deflow.files import replacing
from deflow.loggers import read_metrics
from deflow.reproduction.plan import PATHS, Job, is_technical, name_of
from deflow.reproduction.published import tables
from deflow.run_folder import METRICS_FILE, SUMMARY_FILE, read_summary

OGBENCH_TRANSITIONS = 1_000_000  # at least, of a published data set
OF_THE_METHOD = ("n_step", "horizon", "stages")
MEASURES = {"score": 1.0, "success": 100.0, "return": 1.0}  # the first that a run has, and by what it is multiplied
NOT_ASKED = ("paths.data", "seed", "resume")  # of a command: where and which run it is
PUBLISHED_TIMING = "pre"  # success as OGBench's and FQL's code read it, see `SuccessRule`


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        row: the environment.
        task: of OGBench; None where a row is one task.
        agent: a choice of the group agent.
        seed: of the run.
        measure: what its values are: `success` in %, D4RL's `score`, or `return` where an environment knows neither.
        value: what the table shows; online, after the online updates.
        before: online alone: before them; None where nothing was learnt offline.
        curve: updates -> what an evaluation came to, in the same unit.
        episodes: of an evaluation.
        identity: what must be the same for numbers to be compared.
        command: that began the run.
        commit: of the code that ended the run, if it was a clone.
        versions: of the packages.
        updates_per_second: of the last stage.
        seconds: of the whole run.
        folder: of the run.
        correlation: of its values with what held-out trajectories earned; None where there are no such numbers.
        commits: of the code of all processes that made the run.
    """

    row: str
    task: int | None
    agent: str
    seed: int
    measure: str
    value: float
    before: float | None
    curve: dict[int, float]
    episodes: int
    identity: dict[str, Any]
    command: str
    commit: str | None
    versions: dict[str, str]
    updates_per_second: float
    seconds: float
    folder: str
    correlation: float | None = None
    commits: Sequence[str] = ()

    @property
    def is_share(self) -> bool:
        """Whether its values are shares of episodes, in %: D4RL's score of an antmaze is one."""
        return self.measure == "success" or (self.measure == "score" and self.row.startswith("antmaze"))

    @property
    def asked_for(self) -> frozenset[str]:
        """The arguments of its command that say what it is: not how or where it was made, nor its seed."""
        last = {name_of(setting): setting for setting in shlex.split(self.command)[2:]}  # python train.py
        return frozenset(
            one_way(setting.lstrip("+"))
            for name, setting in last.items()
            if not is_technical(setting) and not name.startswith("hydra.") and name not in (*PATHS, *NOT_ASKED)
        )


def result_of(job: Job) -> Result:
    """The result of a run that is done.

    Raises:
        UserError: if it has no evaluation, or its files are damaged.
    """
    try:
        return _result_of(job)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{job.folder} is damaged ({type(error).__name__}: {error}): move it away") from error


def _result_of(job: Job) -> Result:
    summary = read_summary(job.folder / SUMMARY_FILE)
    if summary is None:
        raise UserError(f"{job.folder} is not done")
    measure = next((name for name in MEASURES if f"eval/{name}" in summary), None)
    if measure is None:
        raise UserError(f"{job.folder} has no evaluation: a table needs runs with an environment")
    found, unit = summary[f"eval/{measure}"], MEASURES[measure]
    *earlier, value = found["last_of_stage"].values() if job.value == "before_and_after" else [found[job.value]]
    before = earlier[-1] if earlier else None  # trained from scratch
    # A summary has null for what is not finite, older ones NaN.
    if any(number is None or not math.isfinite(number) for number in (*earlier[-1:], value)):
        raise ValueError(f"its {measure} is no number")
    rows = read_metrics(job.folder / METRICS_FILE)
    *_, speed = summary["updates_per_second"].values()
    return Result(
        row=job.row,
        task=job.task,
        agent=job.agent,
        seed=job.seed,
        measure=measure,
        value=unit * value,
        before=None if before is None else unit * before,
        curve={int(row["step"]): unit * row[f"eval/{measure}"] for row in rows if f"eval/{measure}" in row},
        episodes=summary["eval_episodes"],
        identity=_identity(summary) | {"measure": measure, "value": job.value, "changed": list(job.changed)},
        command=shlex.join(("python", "train.py", *job.begun_with)),
        commit=summary.get("commit"),
        versions=summary["versions"],
        updates_per_second=speed,
        seconds=summary["seconds"],
        folder=str(job.folder),
        correlation=(summary.get("values") or {}).get("correlation"),
        commits=summary.get("commits") or [summary.get("commit") or "unknown"],
    )


def _identity(summary: dict[str, Any]) -> dict[str, Any]:
    data = summary["data"]
    return {
        "protocol": summary["protocol"],
        "success_timing": summary.get("success_timing"),
        "horizon": summary["horizon"],
        "n_step": summary["n_step"],
        "data": data["name"],
        "generated": bool(data["generated"]),
        "transitions": summary["transitions"]["train"],
        "stages": summary["stages"],
    }


def versions_of_code(results: Iterable[Result]) -> str:
    """Of which commits the runs are, if of several."""
    found = commits_of(results)
    if len(found) < 2:
        return ""
    shown = ", ".join(found)
    return f"The runs are of several versions of the code; commits, and how many runs each has had a part in: {shown}."


def commits_of(results: Iterable[Result]) -> list[str]:
    """The commits under which the runs were made, short, each with the number of runs that it has had a part in."""
    counts = Counter(commit for result in results for commit in result.commits or [result.commit or "unknown"])
    return [f"{_short(commit)} ({runs})" for commit, runs in counts.items()]


def _short(commit: str) -> str:
    number, *changed = commit.split("-")
    return "-".join([number[:7], *changed])


def refuse_mixture(results: Iterable[Result]) -> None:
    """Numbers of two protocols never stand in one cell, nor beside each other in one row.

    How many steps values span is of the method: it may differ between columns, such as of a table of one's own.

    Raises:
        UserError: naming two runs and what differs.
    """
    first: dict[tuple[str, int | None, str | None], Result] = {}
    for result in results:
        for name, value in result.identity.items():
            column = result.agent if name in OF_THE_METHOD else None
            other = first.setdefault((result.row, result.task, column), result)
            if (others := other.identity.get(name)) != value:
                raise UserError(
                    f"{other.folder} and {result.folder} cannot stand in one table: {name} is {others} and {value}"
                )


def why_not_published(table: str, result: Result) -> str | None:
    """Why a run's number is not to be held against the papers'; None if it is."""
    if table not in tables():
        return "a table of its own"
    identity = result.identity
    if identity["changed"]:
        return f"its settings are others ({' '.join(identity['changed'])})"
    if not str(identity["data"]).startswith(result.row):
        return f"its data are others ({identity['data']})"
    if identity["generated"]:
        return "its data were generated here"
    if str(identity["protocol"]).startswith("OGBench") and identity["transitions"] < OGBENCH_TRANSITIONS:
        return "its data are fewer than OGBench's"
    if identity["success_timing"] not in (None, PUBLISHED_TIMING):
        return f"success is read otherwise ({identity['success_timing']})"
    if identity["horizon"] > 1 or identity["n_step"] > 1:
        return "its values span several steps"
    if "Minari" in str(identity["protocol"]):
        return "Minari's data and environments are others"
    return None


def write_results(path: Path, results: Sequence[Result]) -> None:
    """One line a run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))


def read_results(path: Path) -> list[Result]:
    """What `write_results` wrote.

    Raises:
        UserError: if there is no such file, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"there is no results file {path}")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        results = [
            Result(**line | {"value": float(line["value"]), "curve": {int(at): v for at, v in line["curve"].items()}})
            for line in lines
        ]
        for result in results:
            shlex.split(result.command)  # as `asked_for` does later
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no results file of reproduce.py ({type(error).__name__}: {error})") from error
    if not results:
        raise UserError(f"{path} holds no results")
    if any(not isinstance(result.identity, dict) for result in results):
        raise UserError(f"{path} is no results file of reproduce.py (a line has no identity)")
    refuse_mixture(results)
    return results
