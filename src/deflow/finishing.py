"""The end of a run: its summary, its pictures and its table."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from omegaconf import DictConfig

from deflow import report
from deflow.config import plain
from deflow.distributed import is_main_process
from deflow.errors import UserError
from deflow.evaluation import video
from deflow.evaluation.diversity import Neighbourhoods, diversity, draw_actions
from deflow.evaluation.open_loop import draw_transitions, measure_transitions
from deflow.evaluation.values import measure_values
from deflow.modules.transition_flow import TransitionModel
from deflow.policy import evaluation_mode
from deflow.run import Run
from deflow.run_folder import CONFIG_FILE, REPORT_FILE, SUMMARY_FILE, commits_of

log = logging.getLogger(__name__)


def finish(run: Run) -> dict[str, Any]:
    """Draw `report.png`, record the video, hand it all to the tracker, show the table; last, write `summary.json`."""
    summary = _summarise(run)
    if not is_main_process():
        return summary
    if run.config.diversity.states and run.agents[0].spec.image is None:  # distances between images say little
        summary["diversity"] = _measure_diversity(run)
    if (values := _measure_values(run)) is not None:
        summary["values"] = values
    if (model := run.agents[0].transition_model) is not None:
        summary["dynamics"] = _measure_dynamics(run, model)
        allowed = run.agents[0].allowed_steps
        if allowed is not None:
            summary["dynamics"]["imagined_steps_allowed"] = allowed
    _draw_report(run)
    if run.config.video.episodes and run.evaluator is not None:
        _record_video(run)
    _hand_to_trackers(run, summary)
    summary = report.finite(summary)  # as whoever reads the file will have it
    report.print_table(summary, run.folder)
    report.write_json(run.folder / SUMMARY_FILE, summary)  # with it the run is finished
    return summary


def _summarise(run: Run) -> dict[str, Any]:
    source = run.data.source
    summary = report.summarise_run(
        run.metrics.rows,
        config=plain(run.config),
        data=source.provenance(),
        protocol=source.protocol(),
        task=source.task,
        stage_speed=run.stage_speed,
        seconds=run.seconds,
    )
    if run.first_update_at is not None:
        summary["seconds_to_first_update"] = run.first_update_at - psutil.Process().create_time()
    parts = {"train": run.data.transitions, "validation": run.data.validation}
    summary["transitions"] = {name: 0 if part is None else len(part) for name, part in parts.items()}
    summary["units"] = run.units._asdict()
    summary["commits"] = commits_of(run.folder)
    return summary | run.agents[0].facts()


def _measure_diversity(run: Run) -> dict[str, Any]:
    """The policy's diversity beside the data's; draws `actions.png`."""
    settings, policy, seed = run.config.diversity, run.policy(run.agents[0]), run.config.seed
    assert run.data.transitions is not None
    around = Neighbourhoods.of(run.data.transitions, settings.states, settings.neighbours, policy.spec.horizon, seed)
    draw_actions(policy, around, settings.samples, run.folder / "actions.png", seed)
    return diversity(policy, around, settings.samples, settings.radius, seed)


def _measure_values(run: Run) -> dict[str, float | None] | None:
    """How the values of held-out actions go with what was earned after them; None for want of either."""
    agent = run.agents[0]
    if run.data.validation is None or agent.valuing_part is None or not _has_learned(run, agent.valuing_part):
        return None
    with evaluation_mode(agent):
        return measure_values(agent, run.data.validation, run.data.span, run.config.seed)


def _has_learned(run: Run, part: str) -> bool:
    """Whether a stage trained the part, or may have done so in the run whose weights this one began with."""

    def trains(stage: DictConfig) -> bool:
        return (stage.train == "all" or part in stage.train) and part not in stage.get("freeze", ())

    return run.config.ckpt is not None or any(trains(stage) for stage in run.config.stages.values())


def _measure_dynamics(run: Run, model: TransitionModel) -> dict[str, Any]:
    """What the model of the environment's steps is worth; draws `transitions.png`."""
    assert run.data.transitions is not None
    with evaluation_mode(run.agents[0]):
        found = measure_transitions(model, run.data.transitions, run.data.validation, run.config.seed)
    draw_transitions(found, run.folder / "transitions.png")
    return found


def _draw_report(run: Run) -> None:
    path, task = run.folder / REPORT_FILE, run.data.source.task
    report.draw(run.metrics.rows, run.episodes, run.agents[0].panels(), path, plain(run.config), task)


def _record_video(run: Run) -> None:
    """The video is a courtesy: a machine that cannot render still has its result."""
    settings = run.config.video.episodes, run.config.eval.seed
    try:
        video.record_video(run.data.source.make_env, run.policy(run.agents[0]), run.folder / "video.mp4", *settings)
    except UserError as error:
        log.warning("%s", error)


def _hand_to_trackers(run: Run, summary: dict[str, Any]) -> None:
    pictures = (run.folder / name for name in (REPORT_FILE, "actions.png", "transitions.png", "video.mp4"))
    with TemporaryDirectory() as elsewhere:
        report.write_json(Path(elsewhere, SUMMARY_FILE), summary)
        files = [run.folder / CONFIG_FILE, Path(elsewhere, SUMMARY_FILE), *filter(Path.exists, pictures)]
        for tracker in run.trackers:
            for path in files:
                tracker.log_artifact(path)
            tracker.flush()
