"""Checks of a whole configuration: what is said of a command before it makes anything."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from deflow.command_line import choices
from deflow.cores import usable_cores
from deflow.errors import UserError
from deflow.files import check_file, check_folder
from deflow.settings import as_yaml, check_settings, unread
from deflow.tables import config_file

log = logging.getLogger(__name__)

SOLVER = "solver"  # the group
OF_REWARDS = {"data.reward_scale", "data.reward_shift", "data.discount", "data.n_step", "task.discount"}
OCCUPANCY = "deflow.modules.occupancy_flow.OccupancyFlow"


def check_command(config: DictConfig, job: Any, command: str) -> None:
    """Whatever can be said of a command before it begins; nothing is made.

    Args:
        config: what the command gets.
        job: Hydra's own configuration.
        command: name of its script.

    Raises:
        UserError: for the first mistake.
    """
    if command == "train":
        _check_parts(config.agent, job.runtime.choices)
        check(config)
        given = {name: value for name, _, value in (o.lstrip("+").partition("=") for o in job.overrides.task)}
        _refuse_nothing_to_train_on(given)
        _refuse_empty_groups(config, given)
        _refuse_no_rewards(config)
        if config.resume is None:
            _warn_of_unread(config, given)
            _warn_of_aggregate(config, given)
            _warn_of_data_alone(config)
            _warn_of_untrained(config)
            _warn_of_averages(config, given)
            _warn_of_untuned(job.runtime.choices)
    else:
        check_settings(config, command)
    _check_places(config, job, command)


def _check_places(config: DictConfig, job: Any, command: str) -> None:
    """Refuse a folder or file that the command could not write."""
    if command in ("train", "distill"):
        folder = OmegaConf.to_container(job.run, resolve=False)["dir"]  # type: ignore[index, call-overload]
        if config.resume is not None:
            check_folder(Path(config.resume), "resume")
        elif job.mode == RunMode.MULTIRUN or str(folder).startswith("${run_folder"):  # which would make it
            check_folder(Path(config.paths.logs), "paths.logs")
        else:
            check_folder(Path(job.run.dir), "hydra.run.dir")
    elif command == "push" and config.dry:
        check_folder(Path(config.out), "out")
    elif command in ("generate", "inspect_data", "reproduce"):
        check_folder(Path(config.out), "out")
        if command == "reproduce":
            check_folder(Path(config.paths.logs), "paths.logs")
    elif command in ("benchmark", "export", "train_expert") and config.out is not None:
        check_file(Path(config.out), "out")


def _refuse_nothing_to_train_on(given: Mapping[str, str]) -> None:
    """The task that train.yaml names only stands there until another is chosen."""
    if not {"task", "experiment", "resume"} & given.keys():
        raise UserError(
            "nothing to train on: choose task=NAME or experiment=NAME (--help shows them); "
            "experiment=quickstart is the one that takes minutes"
        )


def _refuse_empty_groups(config: DictConfig, given: Mapping[str, str]) -> None:
    """Hydra adds what a group is given to what it holds: nothing is added by `{}`, and nothing is taken out."""
    for name, value in given.items():
        held = OmegaConf.select(config, name) if value == "{}" else None
        if isinstance(held, DictConfig) and held:
            first = str(next(iter(held)))
            raise UserError(f"{name}={{}} would leave it as it is: ~{name}.{first} takes {first} out")


def _refuse_no_rewards(config: DictConfig) -> None:
    """Only who imitates can do without."""
    keys = config.data.source.get("keys")
    if keys is not None and keys.get("rewards", "") is None and not get_object(config.agent._target_).traits.imitates:
        raise UserError(
            f"data.source.keys.rewards=null: {config.agent._target_.rpartition('.')[2]} learns from rewards; "
            "agent=bc and agent=flow_bc do without"
        )


def _check_parts(agent: DictConfig, chosen: Mapping[str, str | None]) -> None:
    """Refuse a choice that makes another kind of part than the agent takes, of which Hydra's groups know nothing."""
    target = agent.get("_target_")
    if not str(target).startswith("deflow."):  # no target, or the user's own, which knows best
        return
    for part, hint in get_type_hints(get_object(target).__init__).items():
        group = f"agent/{part}"
        name, kinds = chosen.get(group), _made_by(hint)
        made = None if name is None else _class_in_file(group, name)
        if made is None or not kinds or _fits(made, kinds):
            continue
        fitting = [other for other in choices(group) if (one := _class_in_file(group, other)) and _fits(one, kinds)]
        raise UserError(
            f"{group}={name} makes {made.__name__}, and {target.rpartition('.')[2]} takes "
            f"{' or '.join(kind.__name__ for kind in kinds)}: use {group}={'|'.join(fitting)}"
        )


def _made_by(hint: Any) -> tuple[type, ...]:
    """The classes of which a constructor's argument makes one for the task, as parts are made; none for others."""
    from deflow.types import Spec  # and with it torch, which an agent's class has brought by now

    for one in _alternatives(hint):
        if get_origin(one) is Callable and get_args(one)[0] in ([Spec], ...):
            return _alternatives(get_args(one)[1])
    return ()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(made: type, kinds: tuple[type, ...]) -> bool:
    """Whether the settings of a class can be those of one of the kinds, which may build on it as `IQLActor` does."""
    return any(issubclass(made, kind) or issubclass(kind, made) for kind in kinds)


def _class_in_file(group: str, name: str) -> type | None:
    """The class of ours that a choice's file names, or the file it begins with; None if that is the user's own."""
    file = config_file(f"{group}/{name}")
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "_target_" in content:
        made = get_object(content["_target_"]) if str(content["_target_"]).startswith("deflow.") else None
        return made if inspect.isclass(made) else None
    others = (entry for entry in content.get("defaults", ()) if isinstance(entry, str) and entry != "_self_")
    return next((made for entry in others if (made := _class_in_file(group, entry)) is not None), None)


def _warn_of_unread(config: DictConfig, given: Mapping[str, str]) -> None:
    """Say which settings were given for nothing."""
    for name, condition in unread(config, "train", given):
        needed = f"{condition.key}={as_yaml(condition.value)}"
        log.warning("%s=%s changes nothing: it is read if %s", name, given[name], needed)

    # What several agents or stages share is a setting of the run's, also where those at hand do not refer to it.
    of_agents = {"tau", SOLVER, *(f"networks.{name}" for name in config.networks)}
    of_stages = {"updates", "online_updates"}
    agent, stages = (OmegaConf.to_yaml(part, resolve=False) for part in (config.agent, config.stages))
    if get_object(config.agent._target_).traits.imitates:
        for name in (name for name in given if name in OF_REWARDS):
            log.warning("%s=%s changes nothing: %s learns from actions alone", name, given[name], config.agent._target_)
    for names, readers, read in ((of_agents, config.agent._target_, agent), (of_stages, "the stages", stages)):
        for name, value in given.items():
            reference = SOLVER if name.startswith(f"{SOLVER}.") else name
            if reference in names and f"${{{reference}}}" not in read:
                log.warning("%s=%s changes nothing: not read by %s", name, value, readers)


def _warn_of_aggregate(config: DictConfig, given: Mapping[str, str]) -> None:
    """Say where what is set of the critic's ensemble has no effect."""
    if get_object(config.agent._target_).traits.takes_lowest:
        for name in ("agent.critic.aggregate", "agent.critic.rho"):
            if name in given:
                log.warning("%s=%s changes nothing: %s takes the lowest", name, given[name], config.agent._target_)
    elif (critic := config.agent.get("critic")) and (critic.get("aggregate"), critic.get("members")) == ("min", 1):
        log.warning("agent.critic.aggregate=min changes nothing: it is of one (agent.critic.members=2 makes two)")


def _warn_of_data_alone(config: DictConfig) -> None:
    """Say that an agent learns from what it does, and that no stage lets it do anything."""
    plays = any(stage.get("environment") is not None for stage in config.stages.values())
    if not plays and get_object(config.agent._target_).traits.learns_by_playing:
        log.warning("%s learns by playing, and no stage plays: use stages=from_scratch", config.agent._target_)


def _warn_of_untuned(chosen: Mapping[str, str | None]) -> None:
    """Say that an agent's table has no row for one of the papers' tasks; own data have none to miss."""
    agent, _, task = (chosen.get("tuned") or "").partition("/")  # ~tuned leaves it out
    rows = choices(f"tuned/{agent}") if agent else []
    # Every task of the papers has a row in DeFlow's table.
    if rows and task not in rows and chosen["data"] == task in choices("tuned/deflow"):
        log.warning("nothing is tuned for agent=%s on %s: its defaults hold", agent, task)


def _warn_of_untrained(config: DictConfig) -> None:
    """Say which parts are frozen before anything has trained them."""
    if config.ckpt is not None:
        return
    stages = list(config.stages.items())
    for number, (name, stage) in enumerate(stages):
        for part in stage.get("freeze", ()):
            if not any(_trains(part, before) for _, before in stages[:number]):
                log.warning(
                    "stage '%s' freezes '%s', which nothing before it trains: it stays as it was drawn at random "
                    "(a stage before it, or ckpt=, brings a trained one)",
                    name,
                    part,
                )


def _warn_of_averages(config: DictConfig, given: Mapping[str, str]) -> None:
    """Say which averages of weights nothing would take: of parts that train throughout and that nothing acts by."""
    for part in get_object(config.agent._target_).traits.never_acts:
        name = f"agent.{part}.ema"
        if given.get(name, "null") != "null" and all(_trains(part, stage) for stage in config.stages.values()):
            log.warning(
                "%s=%s changes nothing: the average stands in for a part that rests or acts, and %s does neither here",
                name,
                given[name],
                part,
            )


def _trains(part: str, stage: DictConfig) -> bool:
    return (stage.train == "all" or part in stage.train) and part not in stage.get("freeze", ())


def check(config: DictConfig) -> None:
    """Check the configuration of a training run: each setting, then what relates several of them.

    Raises:
        UserError: for a setting as `check_settings` says, no stages, several seeds where they cannot be stacked,
            a device that this machine does not have, `trainer.precision=auto` elsewhere than in one process on a
            CPU, or nothing to compile with.
    """
    check_settings(config, "train")
    if not config.stages:
        raise UserError("no stages: choose stages=joint or stages=staged")
    if config.seed + config.seeds > 2**32:
        raise UserError(f"seed={config.seed} with seeds={config.seeds} goes beyond {2**32 - 1}")
    _check_device(config.trainer)
    processes = config.trainer.devices if isinstance(config.trainer.devices, int) else 1
    if config.data.batch_size % (processes * config.trainer.get("num_nodes", 1)):
        raise UserError(f"data.batch_size={config.data.batch_size} does not divide by the {processes} processes")
    _check_single_steps(config)
    online = any(stage.get("environment") is not None for stage in config.stages.values())
    if config.seeds > 1 and (online or config.trainer.devices != 1):
        raise UserError("seeds > 1 trains on data alone and in one process: train the seeds one by one")
    if config.trainer.precision == "auto" and (config.trainer.accelerator, config.trainer.devices) != ("cpu", 1):
        raise UserError("trainer.precision=auto compares on trainer=cpu alone: choose 32-true or bf16-mixed")
    if config.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("compile=true needs a C++ compiler: install g++, or name another in CXX")


def _check_single_steps(config: DictConfig) -> None:
    """Refuse what would teach a model of single steps something else, or that every step is the last."""
    critic, dynamics = (config.agent.get(part) or {} for part in ("critic", "dynamics"))
    models = {
        "agent.dynamics": dynamics,
        "agent/critic=occupancy": critic if critic.get("_target_") == OCCUPANCY else {},
    }
    for name, model in models.items():
        if not model:
            continue
        if config.data.get("n_step", 1) > 1:
            raise UserError(f"{name} learns single steps: leave data.n_step at 1")
        if config.data.discount == 0:
            raise UserError(f"{name} learns from the discount where tasks end: leave task.discount above 0")
        if model.get("discount", config.data.discount) != config.data.discount:
            raise UserError(
                f"{name} has the discount {model['discount']} and data.discount={config.data.discount}: "
                "set task.discount, which both follow"
            )


def _check_device(trainer: DictConfig) -> None:
    accelerator, devices = trainer.accelerator, trainer.devices
    if accelerator == "cpu":
        if (devices != "auto" and not isinstance(devices, int)) or devices == -1:
            raise UserError(f"trainer.devices={devices} names GPUs: on trainer=cpu it is a number of processes")
        if devices != "auto" and devices > max(2, usable_cores()):
            raise UserError(f"trainer.devices={devices} processes would share {usable_cores()} cores: choose fewer")
    if accelerator in ("cpu", "auto"):
        return
    import torch  # seconds, which a mistake in the settings need not wait for

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"gpu": cuda or mps, "cuda": cuda, "mps": mps}[accelerator]:
        raise UserError(f"trainer.accelerator={accelerator}, but torch finds no GPU here: choose trainer=cpu")
    found = max(1, torch.cuda.device_count())
    if isinstance(devices, int) and devices > found:
        raise UserError(f"trainer.devices={devices}, but this machine has {found}")
