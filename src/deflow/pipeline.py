"""The way through the house: data, agent, environment; one `Trainer.fit` a stage; evaluation; report."""

from __future__ import annotations

import errno
import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import psutil
import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from deflow import distributed, report, signals
from deflow.agents.base import WHOLE_STAGES, Agent
from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent, decide
from deflow.callbacks import (
    FINAL,
    LAST,
    AtomicCheckpointIO,
    BetweenUpdates,
    OnlineProgress,
    StageClock,
    StageProgress,
    SystemMetrics,
    asked_to_stop,
)
from deflow.checkpoints import OF_A_STAGE, TO_RESUME, agent_of, check_weights, load_checkpoint, load_weights
from deflow.config import check, plain
from deflow.cores import set_threads
from deflow.data.datamodule import OfflineDataModule
from deflow.data.memory.proposals import ProposalCache
from deflow.data.sources.source import Source
from deflow.description import describe
from deflow.distributed import is_main_process
from deflow.errors import NonFiniteLossError, UserError
from deflow.evaluation import video
from deflow.evaluation.diversity import Neighbourhoods, diversity, draw_actions
from deflow.evaluation.latency import latency
from deflow.evaluation.rollout import Episode, Evaluator, load_episodes, save_episodes
from deflow.evaluation.statistics import summarise
from deflow.files import replacing
from deflow.loggers import CsvMetrics
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.online import OnlineStream
from deflow.precision import faster_precision
from deflow.run_folder import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, REPLAY, SUMMARY_FILE, RunFolder
from deflow.settings import AUTO
from deflow.signals import Stopped
from deflow.stored import load_config
from deflow.tracking import Tracker
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

EPISODES_FILE = "episodes.json"  # of the last evaluation

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
    seconds_before: float = 0.0  # spent on the run by the processes before this one
    started: float = field(default_factory=time.perf_counter)
    first_update_at: float | None = None  # seconds since the epoch
    stage_speed: dict[str, float] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)  # of the last evaluation

    @property
    def agent(self) -> Agent:
        """The first seed's."""
        return self.agents[0]

    @property
    def seconds(self) -> float:
        """Spent on the run so far; what a kill undid is not counted."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def trackers(self) -> list[Tracker]:
        """What is logged to beside `metrics.csv`."""
        return [logger for logger in self.loggers if isinstance(logger, Tracker)]

    @property
    def card(self) -> dict[str, Any]:
        """What a checkpoint says of itself, in plain values."""
        of_task = {"task": self.data.source.task, "spec": list(self.agent.spec)}
        return {"config": plain(self.config), "seconds": self.seconds} | of_task


def train(config: DictConfig, folder: Path, again: str = "python train.py resume={}") -> dict[str, Any]:
    """Train every stage that is not done yet, evaluate, and leave the report in `folder`.

    Args:
        config: of the run; with `resume`, that in `folder` is taken instead.
        folder: of the run.
        again: by what the run would go on if it is stopped, with {} for the folder.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: for whatever the user can mend; a new run that fails before its first update leaves no folder.
    """
    trust_only(config.trust)
    resume = config.resume is not None
    if resume:
        summary = report.read_summary(folder / SUMMARY_FILE)
        if summary is not None:
            report.print_table(summary, folder)
            return summary
        config = load_config(folder / CONFIG_FILE)
    with RunFolder(folder, resume) as held:
        run = None
        try:
            run = prepare(config, folder, resume)
            run_stages(run)
            return finish(run)
        except BaseException as error:
            nothing_done = not resume and (run is None or run.first_update_at is None)
            if nothing_done:
                held.discard()
            go_on = f"go on by {again.format(folder)}"
            if isinstance(error, Stopped):
                error.advice = "before the first update" if nothing_done else go_on
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise UserError(f"cannot write into {folder}: {error.strerror}; mend that, then {go_on}") from error
            raise


def prepare(config: DictConfig, folder: Path, resume: bool) -> Run:
    """Build every component; whatever is wrong with the configuration, the data or the tracker is said here."""
    started = time.perf_counter()
    check(config)
    _make_absolute(config)
    seed_everything(config.seed, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    set_threads(config.threads)

    data = instantiate(config.data)
    source = data.source
    spec = source.spec()
    agents, agent = _build_agents(config, spec)  # before the data, which may take an hour to come
    for name, stage in config.stages.items():
        agent.begin_stage(name, stage.train, first_step=0, freeze=stage.get("freeze", ()))
        if agent.trains_jointly and not all(agent.trains(part) for part in agent.parts):
            raise UserError(f"{type(agents[0]).__name__} trains its policy and its critic together: {WHOLE_STAGES}")
        if stage.get("environment") is not None and not source.has_env:
            raise UserError(f"stage '{name}' plays in the environment, and these data have none")
    data.prepare_data()  # before anything is tracked: a missing file is the commonest error
    data.setup()
    if agent.uses_returns:
        data.add_returns()
    if decide(config, data.transitions):
        agents, agent = _build_agents(config, spec)
    if config.ckpt is not None and not (resume and _is_in_last_stage(config, folder)):
        load_weights(agent, Path(config.ckpt), source.task)
    if config.trainer.precision == AUTO:
        config.trainer.precision = faster_precision(agent, data.sample_stream(TIMED_UPDATES))
    if config.compile:
        agent.compile_losses()
    evaluator = None
    if source.has_env:
        evaluator = Evaluator(source.make_env, config.eval.episodes, config.eval.num_envs, config.eval.seed)

    if not resume and is_main_process():  # first of all files: what is killed from here on can be resumed
        with replacing(folder / CONFIG_FILE) as part:
            part.write_text(OmegaConf.to_yaml(config, resolve=True))
    last_step, seconds_before = _saved(config, folder) if resume else (0, 0.0)
    metrics = CsvMetrics(folder / METRICS_FILE, last_step)
    tracker = instantiate(config.logger, _partial_=True)(run_dir=str(folder))
    if tracker is not None and not isinstance(tracker, Tracker):  # a logger of the user's own
        tracker = Tracker(tracker)
    loggers = [metrics] if tracker is None else [metrics, tracker]
    if not resume and tracker is not None:
        tracker.describe(describe(config, source.task, source.provenance(), folder))
    episodes = load_episodes(folder / EPISODES_FILE) if resume else []
    return Run(
        *(folder, config, resume, agents, agent, data, evaluator, loggers, metrics),
        seconds_before=seconds_before,
        started=started,
        episodes=episodes,
    )


def _make_absolute(config: DictConfig) -> None:
    """Let the run's paths mean the same when it goes on from another working folder."""
    for key in ("paths.logs", "paths.data", "data.source.path", "data.source.dir", "ckpt"):
        path = OmegaConf.select(config, key)
        if path is not None and not path.startswith("~"):
            OmegaConf.update(config, key, str(Path(path).absolute()))


def _build_agents(config: DictConfig, spec: Spec) -> tuple[list[Agent], Agent]:
    """One agent a seed, each as it would be alone, and what trains them: the only one itself, or a stack of all."""
    agents = []
    for seed in range(config.seed, config.seed + config.seeds):
        torch.manual_seed(seed)
        settings = plain(config.agent) | ({"seed": seed} if config.seeds > 1 else {})
        agents.append(build_agent(settings, spec))
    return agents, agents[0] if len(agents) == 1 else SeedStack(agents)


def run_stages(run: Run) -> None:
    """Train every stage that is not done yet."""
    first_step = 0
    for number, (name, stage) in enumerate(run.config.stages.items()):
        run_stage(run, str(name), stage, run.folder / CHECKPOINTS / f"{number}_{name}", first_step)
        first_step += stage.steps
    if run.evaluator is not None:
        run.evaluator.close()


def run_stage(run: Run, name: str, stage: DictConfig, checkpoints: Path, first_step: int) -> None:
    """Train one stage, or load its result if it is done."""
    if run.resume and (checkpoints / FINAL).exists():
        _load_stage(run, name, stage, checkpoints / FINAL, first_step)
        return
    decay = stage.steps if stage.get("cosine_decay") else None
    run.module.begin_stage(name, stage.train, first_step, stage.get("freeze", ()), stage.get("lr"), decay)
    online = _online(run, name, stage)
    clock = StageClock()

    def finish_stage() -> dict[str, Any]:
        run.stage_speed[name] = clock.updates / max(clock.seconds, 1e-9)
        if len(run.agents) > 1:
            _save_each(run, checkpoints)
        return {"updates_per_second": run.stage_speed[name]}

    between_updates = BetweenUpdates(
        checkpoints,
        run.config.checkpoint_every,
        card=lambda: run.card,
        finish=finish_stage,
        clock=clock,
        evaluate=(lambda: _evaluate(run, run.module.run_step)) if _is_evaluated(run, stage) else None,
        evaluate_every=run.config.eval.every,
        evaluated=lambda step: _has_evaluation(run, step),
    )
    callbacks: list[Callback] = [clock, StageProgress(name), between_updates]
    if online is not None:
        callbacks.insert(0, OnlineProgress(online))
    callbacks += [SystemMetrics(tracker) for tracker in run.trackers if tracker.wants_system_metrics]
    run.data.begin_stage(name, stage.steps, _proposals(run, stage), online, between_updates)
    trainer: Trainer = instantiate(run.config.trainer, _partial_=True)(
        max_steps=stage.steps,
        logger=run.loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,  # Lightning's own way, see BetweenUpdates
        val_check_interval=min(run.config.validate_every, stage.steps),
    )
    last = checkpoints / LAST
    resuming = run.resume and last.exists()
    if resuming:
        check_weights(run.module, load_checkpoint(last, TO_RESUME), last)
    try:
        with warnings.catch_warnings(), signals.patient():
            for message in LIGHTNING_WARNINGS:
                warnings.filterwarnings("ignore", message)
            trainer.fit(run.module, run.data, ckpt_path=str(last) if resuming else None, weights_only=True)
            stop = asked_to_stop()
            if stop is not None:  # since the last time that was asked
                raise Stopped(stop, agreed=True)
    except RuntimeError as error:
        if not distributed.lost_a_process(error):
            raise
        raise UserError(f"another process of the run has ended: go on by resume={run.folder}") from error
    except NonFiniteLossError as error:
        kept = f"last good checkpoint: {last}" if last.exists() else "no checkpoint had been written yet"
        raise NonFiniteLossError(f"{error}; {kept}") from error
    finally:
        run.first_update_at = run.first_update_at or clock.first_update_at
    if online is not None:
        online.collector.close()
    run.module.keep_moments({"optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers]})


def _load_stage(run: Run, name: str, stage: DictConfig, final: Path, first_step: int) -> None:
    """Take the result of a stage that is done, and make up for its last evaluation if a kill cut it off."""
    checkpoint = load_checkpoint(final, OF_A_STAGE)
    check_weights(run.module, checkpoint, final)
    run.module.load_state_dict(checkpoint["state_dict"])
    run.module.keep_moments(checkpoint)
    run.stage_speed[name] = checkpoint["deflow"]["updates_per_second"]
    end = first_step + stage.steps
    if _is_evaluated(run, stage) and not _has_evaluation(run, end):
        metrics = _evaluate(run, end)
        for logger in run.loggers:
            logger.log_metrics(metrics, step=end)


def _is_evaluated(run: Run, stage: DictConfig) -> bool:
    return run.evaluator is not None and stage.get("evaluate", True)


def _has_evaluation(run: Run, step: int) -> bool:
    return any(row["step"] == step and "eval/success" in row for row in run.metrics.rows)


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
        folder=run.folder / REPLAY,
        stage=name,
        updates=stage.steps,
        seed=run.config.seed,
        n_step=data.n_step,
        discount=data.discount,
        crop_probability=data.crop_probability,
        **plain(stage.environment),
    )


def finish(run: Run) -> dict[str, Any]:
    """Draw `report.png`, record the video, hand it all to the tracker, show the table; last, write `summary.json`."""
    summary = report.summarise_run(
        run.metrics.rows,
        config=plain(run.config),
        data=run.data.source.provenance(),
        protocol=run.data.source.protocol(),
        task=run.data.source.task,
        stage_speed=run.stage_speed,
        seconds=run.seconds,
    )
    if run.first_update_at is not None:
        summary["seconds_to_first_update"] = run.first_update_at - psutil.Process().create_time()
    if not is_main_process():
        return summary
    if run.config.diversity.states and run.agent.spec.image is None:  # distances between images say little
        _measure_diversity(run, summary)
    report.draw(run.metrics.rows, run.episodes, run.folder / "report.png", plain(run.config), run.data.source.task)
    if run.config.video.episodes and run.evaluator is not None:
        _record(run)
    with TemporaryDirectory() as elsewhere:
        report.write_json(Path(elsewhere, SUMMARY_FILE), summary)
        for tracker in run.trackers:
            for path in (run.folder / CONFIG_FILE, Path(elsewhere, SUMMARY_FILE), *_pictures(run.folder)):
                tracker.log_artifact(path)
            tracker.flush()
    report.print_table(summary, run.folder)
    report.write_json(run.folder / SUMMARY_FILE, summary)  # with it the run is finished
    return summary


def _pictures(folder: Path) -> list[Path]:
    return [path for pattern in ("*.png", "*.mp4") for path in sorted(folder.glob(pattern))]


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Play a checkpoint's policy; the result goes to the terminal and into `evaluation.json` beside the checkpoint.

    Raises:
        UserError: if the checkpoint is broken or of another task than `config.task`.
    """
    set_threads(config.threads)
    trust_only(config.trust)
    path = Path(config.ckpt)
    checkpoint = load_checkpoint(path)
    card = checkpoint["deflow"]
    if config.task is not None:
        _check_task(path, plain(config.task), card["config"]["task"])
    chosen = {key: config[key] for key in ("best_of_n", "refine_steps") if config[key] is not None}
    agent = agent_of(checkpoint, **chosen)
    source: Source = instantiate(card["config"]["data"]["source"])
    if not source.has_env:
        raise UserError(f"{path}: {card['task']} has no environment to evaluate in")
    num_envs = card["config"]["eval"]["num_envs"] if config.num_envs is None else config.num_envs
    result = {"checkpoint": str(path), "task": card["task"], "seed": config.seed} | source.protocol()
    result |= play(agent, source, config.episodes, num_envs, config.seed) | latency(agent)
    settings = card["config"]["agent"] | chosen
    result |= {key: settings[key] for key in ("best_of_n", "refine_steps") if key in settings}
    report.write_json(path.with_name("evaluation.json"), result)
    report.print_evaluation(result)
    return result


def _check_task(path: Path, asked: dict[str, Any], trained: dict[str, Any]) -> None:
    """Raise `UserError` unless a checkpoint was trained in the environment and on the data set that are asked for."""
    names = [" ".join(str(task[key]) for key in ("env", "dataset") if key in task) for task in (asked, trained)]
    if names[0] != names[1]:
        raise UserError(f"{path} is a checkpoint of {names[1] or 'own data'}, not of {names[0]}")


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


def _evaluate(run: Run, step: int) -> dict[str, float]:
    """Play every seed's policy after `step` updates of the run and keep the episodes for the report.

    Returns:
        What the episodes came to, all and of each seed, as it is logged.
    """
    assert run.evaluator is not None
    played = [run.evaluator.run(agent) for agent in run.agents]
    run.episodes = [episode for episodes in played for episode in episodes]
    result = summarise(run.episodes, run.data.source.score)
    if len(played) > 1:
        for seed, episodes in zip(run.data.seeds, played, strict=True):
            result[f"success/seed_{seed}"] = summarise(episodes, run.data.source.score)["success"]
    if is_main_process():
        save_episodes(run.episodes, run.folder / EPISODES_FILE)
        log.info("update %d: success %.2f over %d episodes", step, result["success"], len(run.episodes))
    return {f"eval/{key}": value for key, value in result.items()}


def _is_in_last_stage(config: DictConfig, folder: Path) -> bool:
    """Whether a checkpoint holds all that is still needed: what began with other weights can do without them then."""
    number, name = len(config.stages) - 1, list(config.stages)[-1]
    return any((folder / CHECKPOINTS / f"{number}_{name}" / file).exists() for file in (FINAL, LAST))


def _saved(config: DictConfig, folder: Path) -> tuple[int, float]:
    """Updates of the whole run at its newest checkpoint, and the seconds that they took."""
    step, seconds = 0, 0.0
    for number, name in enumerate(config.stages):
        checkpoints = folder / CHECKPOINTS / f"{number}_{name}"
        final, last = checkpoints / FINAL, checkpoints / LAST
        if not (final.exists() or last.exists()):
            break
        checkpoint = load_checkpoint(final, OF_A_STAGE) if final.exists() else load_checkpoint(last, TO_RESUME)
        step += int(checkpoint["global_step"])
        seconds = checkpoint["deflow"].get("seconds", 0.0)  # older ones do not say
        if not final.exists():
            break
    return step, seconds
