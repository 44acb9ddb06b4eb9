"""From a configuration to a run that is ready to train."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from deflow.agents.base import MODEL, WHOLE_STAGES, Agent
from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent, decide, take_units
from deflow.checkpoints import begin_with, load_to_begin_with
from deflow.checks import check
from deflow.config import plain
from deflow.cores import set_threads
from deflow.data.datamodule import OfflineDataModule
from deflow.data.measures import card
from deflow.data.memory.transitions import as_arrays
from deflow.data.sources.source import Source
from deflow.description import describe
from deflow.distributed import is_main_process
from deflow.errors import UserError
from deflow.evaluation.rollout import Evaluator, load_episodes
from deflow.files import replacing
from deflow.invocation import command_line
from deflow.loggers import CsvMetrics
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.precision import faster_precision, set_product_precision
from deflow.resuming import Progress, is_in_last_stage, saved_progress
from deflow.run import Run, of_learning
from deflow.run_folder import COMMAND_MARK, CONFIG_FILE, EPISODES_FILE, METRICS_FILE
from deflow.sections import AUTO
from deflow.sharing.address import is_address
from deflow.tracking import Tracker

log = logging.getLogger(__name__)

BY_PROCESSES = "train.py -m seed=0,1 threads=1 hydra/launcher=joblib"
TIMED_UPDATES = 4  # of each round in which `trainer.precision=auto` compares


def prepare(config: DictConfig, folder: Path, resume: bool) -> Run:
    """Build every component; whatever is wrong with the configuration, the data or the tracker is said here."""
    started = time.perf_counter()
    saved = saved_progress(config, folder) if resume else Progress()
    check(config)
    _make_absolute(config)
    _set_up_torch(config)

    data = instantiate(config.data)
    _try_stages(config, data.source)  # before the data, which may take an hour to come
    _load_data(data)
    if is_main_process() and not resume:
        data.source.meet_environment(data.source.spec())
    taught = None
    if config.ckpt is not None and not (resume and is_in_last_stage(config, folder)):
        task = None if config.ckpt_of_any_task else data.source.task
        taught = load_to_begin_with(config.ckpt, task, data.transitions.units)
        if not resume:  # then there is nothing left to decide
            take_units(config.agent, taught["deflow"], data.source.spec())
    decide(config, data.transitions)
    agents, learner = build_agents(config, data.source)
    _check_imagined(agents[0], data)
    if config.seeds > 1 and config.trainer.accelerator == "cpu":
        log.info(
            "seeds=%d gains little on a CPU: a process a seed, one thread each, is faster (%s)",
            config.seeds,
            BY_PROCESSES,
        )
    if learner.traits.reads_returns:
        data.add_returns()
    if learner.traits.reads_path:
        data.add_path()
    if taught is not None:
        begin_with(learner, taught, config.ckpt)
    if config.trainer.precision == AUTO:
        config.trainer.precision = faster_precision(learner, data.sample_stream(TIMED_UPDATES))
    if config.compile:
        learner.compile_losses()

    if not resume:  # first of all files: what is killed from here on can be resumed
        _write_config(config, folder)
    metrics = CsvMetrics(folder / METRICS_FILE, saved.updates)
    return Run(
        folder=folder,
        config=config,
        resume=resume,
        agents=agents,
        learner=learner,
        data=data,
        evaluator=_make_evaluator(config, data.source),
        loggers=_open_loggers(config, folder, resume, metrics, data.source),
        metrics=metrics,
        seconds_before=saved.seconds,
        started=started,
        episodes=load_episodes(folder / EPISODES_FILE) if resume else [],
    )


def _check_imagined(agent: Agent, data: OfflineDataModule) -> None:
    model = agent.transition_model
    if model is None:
        return
    if not any(agent.asked_steps):
        if model.within is not None:
            log.warning("agent.dynamics.within changes nothing: no steps are imagined")
        return
    assert data.transitions is not None
    if max(agent.asked_steps) > data.transitions.longest:
        raise UserError(
            f"{max(agent.asked_steps)} imagined steps (agent.dynamics.expansion, or steps of objective=unrolled) are "
            f"more than the {data.transitions.longest} of the longest trajectory of the data"
        )
    if model.within is not None and data.validation is None:
        raise UserError("agent.dynamics.within needs validation trajectories, on which the model's errors are measured")


def build_agents(config: DictConfig, source: Source) -> tuple[list[Agent], Agent]:
    """One agent a seed, each as it would be alone, and what trains them: the only one itself, or a stack of all."""
    agents = []
    for seed in range(config.seed, config.seed + config.seeds):
        torch.manual_seed(seed)
        settings = plain(config.agent) | ({"seed": seed} if config.seeds > 1 else {})
        agents.append(build_agent(settings, source.spec()))
    return agents, agents[0] if len(agents) == 1 else SeedStack(agents)


def _make_absolute(config: DictConfig) -> None:
    """Let the run's paths mean the same when it goes on from another working folder."""
    for key in ("paths.logs", "paths.data", "data.source.path", "data.source.dir", "ckpt"):
        path = OmegaConf.select(config, key)
        if path is not None and not path.startswith("~") and not is_address(path):
            OmegaConf.update(config, key, str(Path(path).absolute()))


def _set_up_torch(config: DictConfig) -> None:
    seed_everything(config.seed, verbose=False)
    if config.matmul_precision == AUTO:
        config.matmul_precision = "highest" if config.trainer.accelerator == "cpu" else "high"
    set_product_precision(config.matmul_precision)
    torch.backends.cudnn.deterministic = True  # sums of a convolution's gradient, too, come out the same twice
    set_threads(config.threads)


def _try_stages(config: DictConfig, source: Source) -> None:
    """Begin every stage once, with agents without weights: whatever they and their stages refuse is said here."""
    with torch.device("meta"):
        agents, learner = build_agents(config, source)
    for name, stage in config.stages.items():
        learner.begin_stage(name, first_step=0, **of_learning(stage))
        together = {learner.trains(part) for part in learner.parts if part != MODEL}
        if learner.traits.trains_jointly and len(together) > 1:
            raise UserError(f"{type(agents[0]).__name__} trains its policy and its critic together: use {WHOLE_STAGES}")
        if agents[0].limits_steps and agents[0].trains(MODEL):
            raise UserError(
                f"agent.dynamics.within is measured before a stage, and in '{name}' the model trains with the rest: "
                "use stages=model_first, or freeze it there"
            )
        if stage.get("proposals") and agents[0].cached_flow is not None:
            _check_cached(agents[0], agents[0].cached_flow, name, stage)
        if stage.get("environment") is not None and learner.traits.reads_path:
            raise UserError(f"agent.path is learned from data alone, and stage '{name}' plays: leave it at null")
        if stage.get("environment") is not None and not source.has_env:
            raise UserError(f"stage '{name}' plays in the environment, and these data have none")


def _check_cached(agent: Agent, flow: BehaviorFlow, name: str, stage: DictConfig) -> None:
    """Cached proposals are those of a flow that rests, at states that are known."""
    (part,) = (part for part in agent.parts if getattr(agent, part) is flow)
    if agent.trains(part):
        raise UserError(
            f"stage '{name}' trains '{part}', whose proposals it would keep from its beginning: freeze it, "
            f"stages.{name}.freeze=[{part}], or set stages.{name}.proposals=null"
        )
    if stage.get("environment") is not None:
        raise UserError(f"stage '{name}' meets states that have no cached proposals: set stages.{name}.proposals=null")


def _load_data(data: OfflineDataModule) -> None:
    """Have the data in memory; what looks wrong with them is said before anything is trained on them."""
    data.prepare_data()
    data.setup()
    assert data.transitions is not None
    if is_main_process():
        card.warn_of(as_arrays(data.transitions), data.source.name)


def _make_evaluator(config: DictConfig, source: Source) -> Evaluator | None:
    if not source.has_env:
        return None
    return Evaluator(source.make_env, config.eval.episodes, config.eval.num_envs, config.eval.seed, source.success)


def _write_config(config: DictConfig, folder: Path) -> None:
    if is_main_process():
        typed = command_line()
        first = f"{COMMAND_MARK}{typed}\n" if typed else ""
        with replacing(folder / CONFIG_FILE) as part:
            part.write_text(first + OmegaConf.to_yaml(config, resolve=True))


def _open_loggers(config: DictConfig, folder: Path, resume: bool, metrics: CsvMetrics, source: Source) -> list[Any]:
    """`metrics.csv`, and the tracker beside it if there is one, which is told what a new run is."""
    tracker = instantiate(config.logger, _partial_=True)(run_dir=str(folder))
    if tracker is None:
        return [metrics]
    if not isinstance(tracker, Tracker):  # a logger of the user's own
        tracker = Tracker(tracker)
    if not resume:
        tracker.describe(describe(config, source.task, source.provenance(), folder))
    return [metrics, tracker]
