"""The stages of a run: one `Trainer.fit` each."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig

from deflow import distributed, signals
from deflow.callbacks import (
    AtomicCheckpointIO,
    BetweenUpdates,
    OnlineProgress,
    StageClock,
    StageProgress,
    SystemMetrics,
    UpdatesAsOneLaunch,
    asked_to_stop,
)
from deflow.checkpoints import ALLOWED_STEPS, OF_A_STAGE, TO_RESUME, check_weights, load_checkpoint, newest_in_run
from deflow.config import plain
from deflow.data.memory.proposals import ProposalCache
from deflow.distributed import is_main_process
from deflow.errors import NonFiniteLossError, UserError
from deflow.evaluation.open_loop import steps_within
from deflow.evaluation.rollout import save_episodes
from deflow.evaluation.statistics import summarise
from deflow.online import OnlineStream
from deflow.resuming import stage_folder
from deflow.run import Run, of_learning
from deflow.run_folder import EPISODES_FILE, FINAL, LAST, REPLAY
from deflow.signals import Stopped

log = logging.getLogger(__name__)

ONE_LAUNCH = "one_launch"  # the one setting of `trainer` that is not Lightning's
MOST_SHOWN = 10  # errors in a line
MOST_AT_ONCE = 50  # updates in a block, after which a signal is heeded
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # lightning sets INFO when it is imported

# Advice that does not apply: `BatchStream` needs no workers, has the length of the whole stage, and goes on
# at any batch by itself; a resumed stage's folder holds its checkpoint; frozen parts are in evaluation mode on purpose.
# That of `LeafSpec` is from inside Lightning, that of capturable=True torch's, of the updates before a recording.
EXPECTED_WARNINGS = (
    ".*does not have many workers",
    ".*Your `IterableDataset` has `__len__` defined",
    ".*your dataloader is not resumable",
    ".*exists and is not empty",
    r".*module\(s\) in eval mode at the start of training",
    r".*isinstance\(treespec, LeafSpec\)",
    ".*constructed with capturable=True",
)


def run_stages(run: Run) -> None:
    """Train every stage that is not done yet."""
    first_step = 0
    for number, (name, stage) in enumerate(run.config.stages.items()):
        checkpoints = stage_folder(run.folder, number, str(name))
        if run.resume and (checkpoints / FINAL).exists():
            _load_stage(run, str(name), stage, checkpoints / FINAL, first_step)
        else:
            _train_stage(run, str(name), stage, checkpoints, first_step)
        first_step += stage.steps
    if run.evaluator is not None:
        run.evaluator.close()


def _load_stage(run: Run, name: str, stage: DictConfig, final: Path, first_step: int) -> None:
    """Take the result of a stage that is done, and make up for its last evaluation if a kill cut it off."""
    checkpoint = load_checkpoint(final, OF_A_STAGE)
    check_weights(run.learner, checkpoint, final)
    run.learner.load_state_dict(checkpoint["state_dict"])
    run.learner.keep_moments(checkpoint)
    _allow_steps(run, checkpoint["deflow"].get(ALLOWED_STEPS))
    run.stage_speed[name] = checkpoint["deflow"]["updates_per_second"]
    end = first_step + stage.steps
    if _is_evaluated(run, stage) and not _has_evaluation(run, end):
        run.learner.to(_make_trainer(run, stage, []).strategy.root_device)
        metrics = evaluate_run(run, end)
        for logger in run.loggers:
            logger.log_metrics(metrics, step=end)


def _train_stage(run: Run, name: str, stage: DictConfig, checkpoints: Path, first_step: int) -> None:
    """Train one stage, from its newest checkpoint if the run goes on in it."""
    run.learner.begin_stage(name, first_step=first_step, **of_learning(stage))
    newest = _take_newest_weights(run, checkpoints / LAST)
    _limit_imagined_steps(run, newest)
    online = _online(run, name, stage)
    clock = StageClock()
    between_updates = _between_updates(run, name, stage, checkpoints, clock)
    callbacks: list[Callback] = [clock, StageProgress(name), between_updates]
    if online is not None:
        callbacks.insert(0, OnlineProgress(online))
    callbacks += [SystemMetrics(tracker) for tracker in run.trackers if tracker.wants_system_metrics]
    trainer = _make_trainer(run, stage, callbacks)
    run.learner.to(trainer.strategy.root_device)  # the end of the stage before moved it away
    at_once = None
    if _records(run, trainer):
        trainer.callbacks.append(UpdatesAsOneLaunch())  # type: ignore[attr-defined]
        at_once = _updates_at_once(run)
    run.data.begin_stage(name, stage.steps, _proposals(run, stage), online, between_updates, at_once)
    try:
        _fit(run, trainer, checkpoints / LAST)
    finally:
        run.first_update_at = run.first_update_at or clock.first_update_at
    if online is not None:
        online.collector.close()
    run.learner.keep_moments({"optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers]})


def _take_newest_weights(run: Run, last: Path) -> Mapping[str, Any] | None:
    """Go on from the weights of the stage's newest checkpoint, if there is one, before anything is computed of them.

    Lightning takes them with all else when its loop begins. Proposals and the limit of imagined steps come earlier, and
    the weights that the stage began with may be known from this checkpoint alone: a run's own `ckpt` is not read again.

    Returns:
        The checkpoint.
    """
    if not (run.resume and last.exists()):
        return None
    checkpoint = load_checkpoint(last, TO_RESUME)
    check_weights(run.learner, checkpoint, last)
    run.learner.load_state_dict(checkpoint["state_dict"])
    return checkpoint


def _allow_steps(run: Run, steps: int | None) -> None:
    for agent in run.agents:
        agent.allowed_steps = steps


def _limit_imagined_steps(run: Run, newest: Mapping[str, Any] | None) -> None:
    """Let agents take as many steps in their models as these are right for, if there is a limit and the models rest."""
    _allow_steps(run, None)  # whatever an earlier stage found
    agents = [agent for agent in run.agents if agent.limits_steps]
    if not agents:
        return
    if newest is not None and ALLOWED_STEPS in newest["deflow"]:  # not measured twice: it may be a narrow decision
        _allow_steps(run, newest["deflow"][ALLOWED_STEPS])
        return
    models = [agent.transition_model for agent in agents if agent.transition_model is not None]
    asked, held_out = max(agents[0].steps_of_stage), run.data.validation
    assert held_out is not None
    measured = [steps_within(model, held_out, asked, run.config.seed) for model in models]
    allowed = min(steps for steps, _ in measured)
    of_steps = [max(errors) for errors in zip(*(errors for _, errors in measured), strict=True)]
    log.info(
        "imagined steps: %d of the %d asked for; %s (agent.dynamics.within=%g; the longest validation trajectory has "
        "%d steps)",
        allowed,
        asked,
        _in_words(of_steps),
        models[0].within,
        held_out.longest,
    )
    _allow_steps(run, allowed)


def _in_words(errors: Sequence[float]) -> str:
    """What is said of the errors of a model after one step, two, ..."""
    if not errors:
        return "no error can be measured, as every task of the validation trajectories ends with its first step"
    shown = ", ".join([f"{error:.3g}" for error in errors[:MOST_SHOWN]] + ["..."] * (len(errors) > MOST_SHOWN))
    return f"errors of the model after 1 to {len(errors)} of them, as shares of those of 'nothing changes': {shown}"


def _between_updates(run: Run, name: str, stage: DictConfig, checkpoints: Path, clock: StageClock) -> BetweenUpdates:
    def finish_stage() -> dict[str, Any]:
        run.stage_speed[name] = clock.updates / max(clock.seconds, 1e-9)
        if len(run.agents) > 1:
            _save_each(run, checkpoints)
        return {"updates_per_second": run.stage_speed[name]}

    return BetweenUpdates(
        checkpoints,
        run.config.checkpoint_every,
        described=run.described,
        finish=finish_stage,
        clock=clock,
        evaluate=(lambda: evaluate_run(run, run.learner.run_step)) if _is_evaluated(run, stage) else None,
        evaluate_every=run.config.eval.every,
        evaluated=lambda step: _has_evaluation(run, step),
    )


def _make_trainer(run: Run, stage: DictConfig, callbacks: list[Callback]) -> Trainer:
    make_trainer = instantiate(run.config.trainer, _partial_=True)
    make_trainer.keywords.pop(ONE_LAUNCH, None)
    if run.learner.has_rhythm and run.config.trainer.get("strategy") == "ddp":
        # A part that is not due has no gradient, for which the other processes would wait.
        make_trainer.keywords["strategy"] = "ddp_find_unused_parameters_true"
    if run.data.validation is None:
        make_trainer.keywords["limit_val_batches"] = 0
    return make_trainer(
        max_steps=stage.steps,
        logger=run.loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,  # Lightning's own way, see BetweenUpdates
        val_check_interval=min(run.config.validate_every, stage.steps),
        log_every_n_steps=min(run.config.trainer.log_every_n_steps, stage.steps),
    )


def _records(run: Run, trainer: Trainer) -> bool:
    """Whether the stage's updates are recorded; said if they are not on a GPU, where it makes a difference."""
    if not run.config.trainer.get(ONE_LAUNCH, True) or trainer.strategy.root_device.type != "cuda":
        return False
    found = [] if run.learner.unrecordable is None else [run.learner.unrecordable]
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        found.append("several processes may take part in it")
    if trainer.gradient_clip_val:
        found.append("Lightning clips its gradients (agent.optimizer.clip is part of an update)")
    if found:
        log.info("an update goes to the GPU kernel by kernel: %s", ", ".join(found))
    return not found


def _updates_at_once(run: Run) -> int:
    """So many updates that nothing is ever due in the midst of them."""
    config = run.config
    rhythms = config.trainer.log_every_n_steps, config.validate_every, config.eval.every, config.checkpoint_every
    common = math.gcd(*rhythms)
    return max(number for number in range(1, MOST_AT_ONCE + 1) if common % number == 0)


def _fit(run: Run, trainer: Trainer, last: Path) -> None:
    """Train to the stage's end, from the checkpoint `last` if it is there and the run goes on."""
    resuming = run.resume and last.exists()
    try:
        with warnings.catch_warnings(), signals.patient():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            trainer.fit(run.learner, run.data, ckpt_path=str(last) if resuming else None, weights_only=True)
            stop = asked_to_stop()
            if stop is not None:  # since the last time that was asked
                raise Stopped(stop, agreed=True)
    except RuntimeError as error:
        if not distributed.lost_a_process(error):
            raise
        raise UserError(f"another process of the run has ended: go on by resume={run.folder}") from error
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {_last_good(run.folder)}") from error


def _last_good(folder: Path) -> str:
    """Where a run whose losses are broken can be taken up, maybe in an earlier stage."""
    try:
        return f"last good checkpoint: {newest_in_run(folder)}"
    except UserError:
        return "no checkpoint had been written yet"


def _is_evaluated(run: Run, stage: DictConfig) -> bool:
    return run.evaluator is not None and stage.get("evaluate", True)


def _has_evaluation(run: Run, step: int) -> bool:
    return any(row["step"] == step and "eval/return" in row for row in run.metrics.rows)


def evaluate_run(run: Run, step: int) -> dict[str, float]:
    """Play every seed's policy after `step` updates of the run and keep the episodes for the report.

    Returns:
        What the episodes came to, all and of each seed, as it is logged.
    """
    assert run.evaluator is not None
    played = [run.evaluator.run(run.policy(agent)) for agent in run.agents]
    run.episodes = [episode for episodes in played for episode in episodes]
    result = summarise(run.episodes, run.data.source.score)
    measure = "success" if "success" in result else "return"
    if len(played) > 1:
        for seed, episodes in zip(run.data.seeds, played, strict=True):
            result[f"{measure}/seed_{seed}"] = summarise(episodes, run.data.source.score)[measure]
    if is_main_process():
        save_episodes(run.episodes, run.folder / EPISODES_FILE)
        log.info("update %d: %s %.2f over %d episodes", step, measure, result[measure], len(run.episodes))
    return {f"eval/{key}": value for key, value in result.items()}


def _save_each(run: Run, checkpoints: Path) -> None:
    """Each seed's agent by itself, for whatever takes a checkpoint."""
    for seed, agent in zip(run.data.seeds, run.agents, strict=True):
        described = run.described()
        alone = {"seed": seed, "seeds": 1}
        of_data, of_agent = described["config"]["data"] | alone, described["config"]["agent"] | {"seed": seed}
        described["config"] |= alone | {"data": of_data, "agent": of_agent}
        weights = {name: weight.clone() for name, weight in agent.state_dict().items()}  # not the whole stack
        content = {"state_dict": weights, "deflow": described}
        AtomicCheckpointIO().save_checkpoint(content, checkpoints / f"seed_{seed}.ckpt")


def _proposals(run: Run, stage: DictConfig) -> list[ProposalCache] | None:
    """The stage's cached proposals of each seed, if it asks for them and the agent can use them."""
    if not stage.get("proposals") or run.agents[0].cached_flow is None:
        return None
    assert run.data.transitions is not None
    caches = []
    for seed, agent in zip(run.data.seeds, run.agents, strict=True):
        assert agent.cached_flow is not None
        path = run.folder / ("proposals.npy" if len(run.agents) == 1 else f"proposals_{seed}.npy")
        cache = ProposalCache.load_or_compute(agent.cached_flow, run.data.transitions, stage.proposals, seed, path)
        caches.append(cache)
    return caches


def _online(run: Run, name: str, stage: DictConfig) -> OnlineStream | None:
    """The batches of a stage in the environment; None for a stage on the data alone."""
    if stage.get("environment") is None:
        return None
    data = run.data
    assert data.transitions is not None
    return OnlineStream.of(
        run.agents[0],
        data.source,
        data.transitions,
        folder=run.folder / REPLAY,
        stage=name,
        updates=stage.steps,
        seed=run.config.seed,
        span=data.span,
        crop_probability=data.crop_probability,
        **plain(stage.environment),
    )
