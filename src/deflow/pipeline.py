"""The way through the house: data, agent, environment; one `Trainer.fit` a stage; evaluation; report."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import MLFlowLogger
from omegaconf import DictConfig, OmegaConf

from deflow import report
from deflow.agents.base import Agent
from deflow.agents.seed_stack import SeedStack
from deflow.bare_loop import faster_precision
from deflow.build import AUTO, build_agent, decide
from deflow.callbacks import (
    FINAL,
    LAST,
    AtomicCheckpointIO,
    OnlineProgress,
    PeriodicEvaluation,
    StageCheckpoint,
    StageClock,
    StageProgress,
    SystemMetrics,
)
from deflow.checkpoints import OF_A_STAGE, TO_RESUME, agent_of, check_weights, load_checkpoint, load_weights
from deflow.config import CONFIG_FILE, check, plain
from deflow.data.datamodule import OfflineDataModule
from deflow.data.proposals import ProposalCache
from deflow.data.source import Source
from deflow.distributed import is_main_process
from deflow.errors import NonFiniteLossError, UserError
from deflow.evaluation import video
from deflow.evaluation.diversity import Neighbourhoods, diversity, draw_actions
from deflow.evaluation.latency import latency
from deflow.evaluation.rollout import Episode, Evaluator
from deflow.evaluation.statistics import summarise
from deflow.files import replacing
from deflow.loggers import CsvMetrics
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.online import OnlineStream
from deflow.stored import load_config
from deflow.trust import trust_only
from deflow.types import Spec

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # lightning sets INFO when it is imported

# Lightning's advice that does not apply: `BatchStream` needs no workers, has the length of the whole stage, and goes on
# at any batch by itself; a resumed stage's folder holds its checkpoint. The last is from inside Lightning.
LIGHTNING_WARNINGS = (
    ".*does not have many workers",
    ".*Your `IterableDataset` has `__len__` defined",
    ".*your dataloader is not resumable",
    ".*exists and is not empty",
    r".*isinstance\(treespec, LeafSpec\)",
)

TIMED_UPDATES = 4  # of each round in which `trainer.precision=auto` compares


@dataclass
class Run:
    """One training run: its folder, its components and what is known of it so far."""

    folder: Path
    config: DictConfig
    resume: bool
    agents: list[Agent]  # one a seed
    module: Agent  # what is trained: the only agent, or all of them as one
    data: OfflineDataModule
    evaluator: Evaluator | None  # None: the data have no environment
    loggers: list[Any]
    metrics: CsvMetrics
    first_update_at: float | None = None  # seconds since the epoch
    stage_speed: dict[str, float] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)

    @property
    def agent(self) -> Agent:
        """The first seed's."""
        return self.agents[0]

    @property
    def card(self) -> dict[str, Any]:
        """What a checkpoint says of itself, in plain values."""
        return {"config": plain(self.config), "task": self.data.source.task, "spec": list(self.agent.spec)}


def train(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Train every stage that is not done yet, evaluate, and leave the report in `folder`.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: for whatever the user can mend; a new run that fails before its first update leaves no folder.
    """
    started = time.perf_counter()
    trust_only(config.trust)
    resume = config.resume is not None
    if resume:
        config = load_config(folder / CONFIG_FILE)
    try:
        run = prepare(config, folder, resume)
    except BaseException:  # Hydra wraps what a component raises
        if not resume and is_main_process():
            _discard(folder)
        raise
    first_step = 0
    for number, (name, stage) in enumerate(config.stages.items()):
        run_stage(run, str(name), stage, folder / "checkpoints" / f"{number}_{name}", first_step)
        first_step += stage.steps
    if run.evaluator is not None:
        run.evaluator.close()
    return finish(run, time.perf_counter() - started)


def prepare(config: DictConfig, folder: Path, resume: bool) -> Run:
    """Build every component; whatever is wrong with the configuration, the data or the tracker is said here."""
    check(config)
    seed_everything(config.seed, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    data = instantiate(config.data)
    source = data.source
    spec = source.spec()
    agents, agent = _build_agents(config, spec)  # before the data, which may take an hour to come
    for name, stage in config.stages.items():
        agent.begin_stage(name, stage.train, first_step=0, freeze=stage.get("freeze", ()))
        if agent.trains_jointly and not all(agent.trains(part) for part in agent.parts):
            raise UserError(f"{type(agents[0]).__name__} trains its policy and its critic together: use stages=joint")
        if stage.get("environment") is not None and not source.has_env:
            raise UserError(f"stage '{name}' plays in the environment, and these data have none")
    data.prepare_data()  # before anything is tracked: a missing file is the commonest error
    data.setup()
    if agent.uses_returns:
        data.add_returns()
    if decide(config, data.transitions):
        agents, agent = _build_agents(config, spec)
    if config.ckpt is not None:
        load_weights(agent, Path(config.ckpt), source.task)
    if config.trainer.precision == AUTO:
        config.trainer.precision = faster_precision(agent, data.sample_stream(TIMED_UPDATES))
    if config.compile:
        agent.compile_losses()
    evaluator = None
    if source.has_env:
        evaluator = Evaluator(source.make_env, config.eval.episodes, config.eval.num_envs, config.eval.seed)

    folder.mkdir(parents=True, exist_ok=True)
    metrics = CsvMetrics(folder / "metrics.csv", last_step=_saved_step(config, folder) if resume else 0)
    tracker = instantiate(config.logger, _partial_=True)(run_dir=str(folder))
    if not resume and is_main_process():
        with replacing(folder / CONFIG_FILE) as part:
            part.write_text(OmegaConf.to_yaml(config, resolve=True))
    loggers = [metrics] if tracker is None else [metrics, tracker]
    if not resume:
        for logger in loggers:
            logger.log_hyperparams(plain(config))
    return Run(folder, config, resume, agents, agent, data, evaluator, loggers, metrics)


def _build_agents(config: DictConfig, spec: Spec) -> tuple[list[Agent], Agent]:
    """One agent a seed, each as it would be alone, and what trains them: the only one itself, or a stack of all."""
    agents = []
    for seed in range(config.seed, config.seed + config.seeds):
        torch.manual_seed(seed)
        settings = plain(config.agent) | ({"seed": seed} if config.seeds > 1 else {})
        agents.append(build_agent(settings, spec))
    return agents, agents[0] if len(agents) == 1 else SeedStack(agents)


def run_stage(run: Run, name: str, stage: DictConfig, checkpoints: Path, first_step: int) -> None:
    """Train one stage, or load its result if it is done."""
    final = checkpoints / FINAL
    if run.resume and final.exists():
        card = load_checkpoint(final, OF_A_STAGE)
        check_weights(run.module, card, final)
        run.module.load_state_dict(card["state_dict"])
        run.module.keep_moments(card)
        run.stage_speed[name] = card["deflow"]["updates_per_second"]
        return
    decay = stage.steps if stage.get("cosine_decay") else None
    run.module.begin_stage(name, stage.train, first_step, stage.get("freeze", ()), stage.get("lr"), decay)
    online = _online(run, name, stage)
    run.data.begin_stage(name, stage.steps, _proposals(run, stage), online)
    clock = StageClock()
    checkpoint = StageCheckpoint(checkpoints, run.config.checkpoint_every, run.card)
    callbacks: list[Callback] = [clock, StageProgress(name), checkpoint]
    evaluation = None
    if run.evaluator is not None and stage.get("evaluate", True):
        evaluation = PeriodicEvaluation(lambda: _evaluate(run), run.config.eval.every)
        callbacks.insert(1, evaluation)  # before the checkpoint of the same step
    if online is not None:
        callbacks.insert(0, OnlineProgress(online))
    callbacks += [SystemMetrics(logger) for logger in run.loggers if isinstance(logger, MLFlowLogger)]
    trainer: Trainer = instantiate(run.config.trainer, _partial_=True)(
        max_steps=stage.steps,
        logger=run.loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        val_check_interval=min(run.config.validate_every, stage.steps),
    )
    last = checkpoints / LAST
    resuming = run.resume and last.exists()
    if resuming:
        check_weights(run.module, load_checkpoint(last, TO_RESUME), last)
    try:
        with warnings.catch_warnings():
            for message in LIGHTNING_WARNINGS:
                warnings.filterwarnings("ignore", message)
            trainer.fit(run.module, run.data, ckpt_path=str(last) if resuming else None)
    except NonFiniteLossError as error:
        kept = f"last good checkpoint: {last}" if last.exists() else "no checkpoint had been written yet"
        raise NonFiniteLossError(f"{error}; {kept}") from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    if online is not None:
        online.collector.close()
    run.first_update_at = run.first_update_at or clock.first_update_at
    run.stage_speed[name] = clock.updates / max(clock.seconds - (evaluation.seconds if evaluation else 0), 1e-9)
    checkpoint.card = run.card | {"updates_per_second": run.stage_speed[name]}
    if len(run.agents) > 1:
        _save_each(run, checkpoints)
    trainer.save_checkpoint(final)
    run.module.keep_moments({"optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers]})


def _save_each(run: Run, checkpoints: Path) -> None:
    """Each seed's agent by itself, for whatever takes a checkpoint."""
    for seed, agent in zip(run.data.seeds, run.agents, strict=True):
        card = run.card
        alone = {"seed": seed, "seeds": 1}
        of_data, of_agent = card["config"]["data"] | alone, card["config"]["agent"] | {"seed": seed}
        card["config"] |= alone | {"data": of_data, "agent": of_agent}
        weights = {name: weight.clone() for name, weight in agent.state_dict().items()}  # not the whole stack
        content = {"state_dict": weights, "deflow": card}
        AtomicCheckpointIO().save_checkpoint(content, checkpoints / f"seed_{seed}.ckpt")


def _proposals(run: Run, stage: DictConfig) -> list[ProposalCache] | None:
    """The stage's cached proposals of each seed, if it asks for them and the agent can use them."""
    if not stage.get("proposals") or not run.agent.uses_cached_proposals:
        return None
    assert run.data.transitions is not None
    caches = []
    for seed, agent in zip(run.data.seeds, run.agents, strict=True):
        flow = cast(BehaviorFlow, agent.behavior_flow)
        path = run.folder / ("proposals.npy" if len(run.agents) == 1 else f"proposals_{seed}.npy")
        caches.append(ProposalCache.load_or_compute(flow, run.data.transitions, stage.proposals, seed, path))
    return caches


def _online(run: Run, name: str, stage: DictConfig) -> OnlineStream | None:
    """The batches of a stage in the environment; None for a stage on the data alone."""
    if stage.get("environment") is None:
        return None
    data = run.data
    assert data.transitions is not None
    return OnlineStream.of(
        run.agent,
        data.source,
        data.transitions,
        folder=run.folder / "replay",
        stage=name,
        updates=stage.steps,
        seed=run.config.seed,
        n_step=data.n_step,
        discount=data.discount,
        crop_probability=data.crop_probability,
        **plain(stage.environment),
    )


def finish(run: Run, seconds: float) -> dict[str, Any]:
    """Write `summary.json` and `report.png`, record the video, show the table, hand all of it to the tracker."""
    summary = report.summarise_run(
        run.metrics.rows,
        config=plain(run.config),
        data=run.data.source.provenance(),
        protocol=run.data.source.protocol(),
        task=run.data.source.task,
        stage_speed=run.stage_speed,
        seconds=seconds,
    )
    if run.first_update_at is not None:
        summary["seconds_to_first_update"] = run.first_update_at - psutil.Process().create_time()
    if not is_main_process():
        return summary
    if run.config.diversity.states and run.agent.spec.image is None:  # distances between images say little
        _measure_diversity(run, summary)
    report.draw(run.metrics.rows, run.episodes, run.folder / "report.png", plain(run.config), run.data.source.task)
    report.write_json(run.folder / "summary.json", summary)
    if run.config.video.episodes and run.evaluator is not None:
        _record(run)
    for logger in run.loggers:
        if isinstance(logger, MLFlowLogger):
            for name in (CONFIG_FILE, "summary.json", "report.png", "actions.png"):
                if (run.folder / name).exists():
                    logger.experiment.log_artifact(logger.run_id, str(run.folder / name))
    report.print_table(summary, run.folder)
    return summary


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Play a checkpoint's policy; the result goes to the terminal and into `evaluation.json` beside the checkpoint.

    Raises:
        UserError: if the checkpoint is broken or of another task than `config.task`.
    """
    trust_only(config.trust)
    path = Path(config.ckpt)
    checkpoint = load_checkpoint(path)
    card = checkpoint["deflow"]
    if config.task is not None and config.task != card["task"]:
        raise UserError(f"{path} is a checkpoint of {card['task']}, not of {config.task}")
    chosen = {key: config[key] for key in ("best_of_n", "refine_steps") if config[key] is not None}
    agent = agent_of(checkpoint, **chosen)
    source: Source = instantiate(card["config"]["data"]["source"])
    if not source.has_env:
        raise UserError(f"{path}: {card['task']} has no environment to evaluate in")
    num_envs = config.num_envs or card["config"]["eval"].get("num_envs")
    result = {"checkpoint": str(path), "task": card["task"], "seed": config.seed} | source.protocol()
    result |= play(agent, source, config.episodes, num_envs, config.seed) | latency(agent)
    settings = card["config"]["agent"] | chosen
    result |= {key: settings[key] for key in ("best_of_n", "refine_steps") if key in settings}
    report.write_json(path.with_name("evaluation.json"), result)
    report.print_evaluation(result)
    return result


def _measure_diversity(run: Run, summary: dict[str, Any]) -> None:
    """Put the policy's diversity beside the data's into `summary`, and draw `actions.png`."""
    settings = run.config.diversity
    assert run.data.transitions is not None
    horizon = run.agent.spec.horizon
    around = Neighbourhoods.of(run.data.transitions, settings.states, settings.neighbours, horizon, run.config.seed)
    summary["diversity"] = diversity(run.agent, around, settings.samples, settings.radius, run.config.seed)
    draw_actions(run.agent, around, settings.samples, run.folder / "actions.png", run.config.seed)


def play(agent: Agent, source: Source, episodes: int, num_envs: int | None, seed: int) -> dict[str, float]:
    """What `episodes` episodes of the policy in the source's environment came to."""
    evaluator = Evaluator(source.make_env, episodes, num_envs, seed)
    played = evaluator.run(agent)
    evaluator.close()
    return summarise(played, source.score)


def _record(run: Run) -> None:
    """The video is a courtesy: a machine that cannot render still has its result."""
    settings = run.config.video.episodes, run.config.eval.seed
    try:
        video.record_video(run.data.source.make_env, run.agent, run.folder / "video.mp4", *settings)
    except UserError as error:
        log.warning("%s", error)


def _evaluate(run: Run) -> dict[str, float]:
    """Play every seed's policy and remember the episodes for the report; what they came to, all and of each seed."""
    assert run.evaluator is not None
    played = [run.evaluator.run(agent) for agent in run.agents]
    run.episodes = [episode for episodes in played for episode in episodes]
    result = summarise(run.episodes, run.data.source.score)
    if len(played) > 1:
        for seed, episodes in zip(run.data.seeds, played, strict=True):
            result[f"success/seed_{seed}"] = summarise(episodes, run.data.source.score)["success"]
    if is_main_process():
        step, episodes_played = run.module.run_step, len(run.episodes)
        log.info("update %d: success %.2f over %d episodes", step, result["success"], episodes_played)
    return result


def _saved_step(config: DictConfig, folder: Path) -> int:
    """Updates of the whole run at its newest checkpoint."""
    step = 0
    for number, (name, stage) in enumerate(config.stages.items()):
        checkpoints = folder / "checkpoints" / f"{number}_{name}"
        if (checkpoints / FINAL).exists():
            step += stage.steps
        elif (checkpoints / LAST).exists():
            return step + int(load_checkpoint(checkpoints / LAST, TO_RESUME)["global_step"])
        else:
            break
    return step


def _discard(folder: Path) -> None:
    """Remove a run's folder that holds nothing but Hydra's empty log."""
    if folder.is_dir() and not (folder / "checkpoints").exists():
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
