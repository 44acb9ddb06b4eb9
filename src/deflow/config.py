"""What Hydra needs of us: resolvers, one-line errors, checks that need the whole configuration."""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deflow.cores import set_threads, spin_briefly, usable_cores
from deflow.errors import UserError
from deflow.files import check_file, check_folder
from deflow.help import help_text
from deflow.imports import quick_imports
from deflow.invocation import as_script_and_as_typed
from deflow.run_folder import leaving_no_empty, new_run_folder, notice_new
from deflow.settings import as_yaml, check_settings, unknown_setting, unread
from deflow.signals import Stopped, end_with_parent, listening
from deflow.tables import CONFIG_DIR, look_first_in

log = logging.getLogger(__name__)

OF_THE_USER = (UserError, HydraException, OmegaConfBaseException)
OCCUPANCY = "deflow.modules.occupancy_flow.OccupancyFlow"
PARENT = "DEFLOW_PARENT"  # variable with the number of the process that starts others


OmegaConf.register_new_resolver("run_folder", new_run_folder, use_cache=True, replace=True)


def times(factor: float, count: Any) -> Any:
    """`${times:1.5,${updates}}` in a YAML file; what is no number is left to the check of the settings."""
    return round(factor * count) if isinstance(count, int | float) else count


OmegaConf.register_new_resolver("times", times, replace=True)


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig, Path], Any]], Callable[[], None]]:
    """Turn `main(config, run_folder)` into a command: Hydra composes the configuration, errors become one line.

    Exit status: 2 for an error of the user's, 1 (with a traceback) for one of ours. The jobs of a sweep (`-m`) go on
    after one that fails; the status is then that of the worst.
    """

    def decorate(main: Callable[[DictConfig, Path], Any]) -> Callable[[], None]:
        sweep = Sweep()

        @hydra.main(version_base=None, config_path=CONFIG_DIR, config_name=config_name)
        def composed(config: DictConfig) -> None:
            job = HydraConfig.get()
            folder = Path(job.runtime.output_dir)
            if job.mode == RunMode.MULTIRUN:
                with sweep.job(job.overrides.task), leaving_no_empty(folder):
                    check_command(config, job, config_name)
                    set_threads(config.threads)
                    main(config, folder)
                return
            # Here and not only outside, or Hydra prints a line of its own.
            with _errors_in_one_line(), leaving_no_empty(folder):
                set_threads(config.threads)
                main(config, folder)

        @wraps(main)
        def command() -> None:
            # Hydra prints its errors over many lines unless it is told to raise them.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            spin_briefly()
            if "LOCAL_RANK" in os.environ:  # a process of several, started by Lightning or torchrun
                end_with_parent(int(os.environ.get(PARENT, os.getppid())))
            os.environ[PARENT] = str(os.getpid())  # for the processes that this one may start
            with _errors_in_one_line(config_name, sweep), listening():
                # Hydra by itself takes files from there and no tables, and they go last.
                look_in_own_folder(_parsed(sys.argv[1:]).config_dir)
                overrides = [readable(argument) for argument in overrides_of(sys.argv[1:])]
                # Hydra's parser does not take a flag between two overrides.
                sys.argv[1:] = [*overrides, *_flags_of(sys.argv[1:])]
                if {"--help", "-h"} & {*sys.argv}:
                    text = help_text(Path(CONFIG_DIR), config_name, overrides)
                    print(text.replace(*as_script_and_as_typed(config_name)))
                else:
                    composed()

        return command

    return decorate


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """What of a command line is neither a flag of Hydra's nor the value of one."""
    return list(_parsed(arguments).overrides)


def _parsed(arguments: Sequence[str]) -> Namespace:
    return get_args_parser().parse_known_intermixed_args(arguments)[0]


def _flags_of(arguments: Sequence[str]) -> list[str]:
    """The rest of it."""
    overrides = overrides_of(arguments)
    return [argument for argument in arguments if argument not in overrides]


def look_in_own_folder(folder: str | Path | None) -> None:
    """Let a folder of the user's own, with files and tables, go first in all that is composed from now on; None: none.

    Raises:
        UserError: if there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir: no folder {folder}")
    look_first_in(Path(folder).absolute() if folder is not None else None)


class SettingsCheck(Callback):
    """What comes before Hydra makes a folder for a command: its configuration is checked; configs/hydra names it."""

    def on_run_start(self, config: DictConfig, **more: Any) -> None:
        with _errors_in_one_line(), _bugs_end_it(), quick_imports():
            job = config.hydra
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            check_command(own, job, more["config_name"])
            notice_new(Path(job.run.dir))

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        with _errors_in_one_line(), _bugs_end_it():
            notice_new(Path(config.hydra.sweep.dir))


@contextmanager
def _bugs_end_it() -> Iterator[None]:
    """Of an error in a callback Hydra makes a warning, and goes on."""
    try:
        yield
    except OF_THE_USER:
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class Sweep:
    """The jobs of a `-m` that were played in this process, and the errors of those that failed."""

    def __init__(self) -> None:
        self.jobs = 0
        self.errors: list[Exception] = []

    @contextmanager
    def job(self, overrides: Iterable[str]) -> Iterator[None]:
        """Say at once what fails, and let it go on to Hydra, which goes on to the next job."""
        self.jobs += 1
        try:
            yield
        except Exception as error:
            self.errors.append(error)
            if not isinstance(error, OF_THE_USER):
                traceback.print_exc()
            print(f"error: {' '.join(overrides)}: {one_line(error)}", file=sys.stderr)
            raise

    def end(self) -> None:
        """The last line, and the exit status."""
        print(f"error: {len(self.errors)} of {self.jobs} jobs failed", file=sys.stderr)
        sys.exit(2 if all(isinstance(error, OF_THE_USER) for error in self.errors) else 1)


def readable(argument: str) -> str:
    """A command line's override as Hydra's grammar has it.

    Raises:
        UserError: if it cannot be guessed what is meant.
    """
    # A group inside a group is overridden with a slash; the dot of every other override is what fingers type.
    argument = re.sub(r"^(\+settings\.)?agent\.(\w+)=(?=[a-z]\w*$)", _as_group, argument)
    # Among a table's settings it is a key like others, and Hydra has keys with a slash in braces alone.
    argument = re.sub(r"^\+settings\.(\w+/\w+)=(\w+)$", r"++settings={\1:\2}", argument)
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals:
        return argument
    if key == "tuned":
        raise UserError(f"{argument} is no choice: what is tuned follows agent= and task=; ~tuned leaves it out")
    if _parses(argument):
        _refuse_a_choice_without_name(argument)
        return argument
    as_text = f"{key}={quoted(value)}"
    if value.startswith(("[", "{", "'", '"')) or not _parses(as_text):
        raise UserError(f'cannot read {argument}: close its brackets and quotes; as text it is "{as_text}"')
    return as_text


def quoted(text: str) -> str:
    """Text as Hydra's grammar takes it, whatever is in it."""
    # A backslash counts only before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", r"\'"), text) + "'"


def _parses(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _refuse_a_choice_without_name(argument: str) -> None:
    """A group takes a name, or several; what Hydra says to `logger=null` is not for users."""
    override = OverridesParser.create().parse_override(argument)
    if override.is_sweep_override() or isinstance(override.value(), str | list):
        return
    if names := choices(override.key_or_group):
        raise UserError(f"{argument} is no choice: {override.key_or_group}= takes one of {', '.join(names)}")


def choices(group: str) -> list[str]:
    """Names that a group of configurations takes, sorted; none if it is not a group."""
    if GlobalHydra.instance().is_initialized():  # a command that composes for another one
        return GlobalHydra.instance().config_loader().get_group_options(group)
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        return GlobalHydra.instance().config_loader().get_group_options(group)


def _as_group(match: re.Match[str]) -> str:
    """`agent.critic=` as `agent/critic=`, if there is such a group."""
    return f"{match[1] or ''}agent/{match[2]}=" if choices(f"agent/{match[2]}") else match[0]


@contextmanager
def _errors_in_one_line(command: str = "", sweep: Sweep | None = None) -> Iterator[None]:
    """End with a line and a status. Around the whole command: its name, and the jobs if it is a sweep."""
    try:
        yield
    except Exception as error:
        if sweep is not None and sweep.errors:
            sweep.end()
        if not isinstance(error, OF_THE_USER):
            raise
        print(f"error: {one_line(error, command, sys.argv[1:])}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if _is_another_process_of_a_run():
            # Lightning takes any status but 0 for a fault and kills the main process, which else would wait for ever.
            sys.exit(0 if stop.agreed else stop.status)
        print(stop, file=sys.stderr)
        sys.exit(stop.status)


def _is_another_process_of_a_run() -> bool:
    """Whether this is not rank 0, by the launchers' variables: nothing may be imported here, see `quick_imports`."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") != "0"


def one_line(error: BaseException, command: str = "", arguments: Sequence[str] = ()) -> str:
    """What an error of `OF_THE_USER` says of a command with these arguments."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):  # Hydra wraps what a component raises
        cause = cause.__cause__
    if cause is not None:
        return str(cause)
    if (
        unknown := re.match(r"Could not (?:override|delete from config\.) '([^']+)'", str(error))
    ) is not None and command:
        if unknown[1].partition(".")[0] == "settings":  # of `reproduce.py`, which has none until they are added
            return f"no setting '{unknown[1]}' yet: add it, +{unknown[1]}=..."
        return str(unknown_setting(unknown[1], _known_settings(command, arguments, without=unknown[1])))
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return _unknown_choice(group, name, choices(group) or sorted(error.options))
    while not str(error) and error.__cause__ is not None:  # Hydra's wrapper of a grammar error says nothing itself
        error = error.__cause__
    message = str(error).removeprefix("UserError raised while resolving interpolation: ").partition("\n    full_key")[0]
    return re.sub(r"\s+", " ", message).strip()


def _unknown_choice(group: str, name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, 1, cutoff=0.75)
    meant = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown {group} '{name}'{meant}: choose one of {', '.join(options)}"


def _known_settings(command: str, arguments: Sequence[str], without: str) -> list[str]:
    """Dotted names of all that `arguments` could set, were it not for the override of `without`."""
    kept = [o for o in overrides_of(arguments) if re.split("[=@]", o.lstrip("+~"))[0] != without]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        try:
            config = compose(command, overrides=kept, return_hydra_config=True)
        except HydraException:  # there is more than one mistake
            config = compose(command, return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    OmegaConf.set_readonly(config, False)
    groups = [g.replace("/", ".") for g in config.hydra.runtime.choices if not g.startswith("hydra/") and "@" not in g]
    del config.hydra
    return [*_dotted_keys(config), *groups]


def _dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        yield f"{prefix}{key}"
        value = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from _dotted_keys(value, f"{prefix}{key}.")


def refuse_other_overrides(overrides: Iterable[str]) -> None:
    """A run that is resumed keeps its own configuration; whatever else is asked for would be silently lost.

    Raises:
        UserError: if there are overrides other than `resume` and `trust`.
    """
    allowed = ("resume=", "trust=")  # what a file may name is not the file's to say
    others = [override for override in overrides if not override.startswith(allowed)]
    if others:
        raise UserError(f"resume= keeps the run's own configuration: drop {' '.join(others)}")


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, loadable without OmegaConf."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


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
        check(config)
        _refuse_nothing_to_train_on(job.overrides.task)
        if config.resume is None:
            _warn_of_unread(config, job.overrides.task)
            _warn_of_untrained(config)
            _warn_of_untuned(job.runtime.choices)
    else:
        check_settings(config, command)
    if command in ("train", "distill"):
        dir = OmegaConf.to_container(job.run, resolve=False)["dir"]  # type: ignore[index, call-overload]
        if config.resume is not None:
            check_folder(Path(config.resume), "resume")
        elif job.mode == RunMode.MULTIRUN or str(dir).startswith("${run_folder"):  # which would make it
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


def _refuse_nothing_to_train_on(overrides: Iterable[str]) -> None:
    """The task that train.yaml names only stands there until another is chosen."""
    if not {"task", "experiment", "resume"} & {override.lstrip("+").partition("=")[0] for override in overrides}:
        raise UserError(
            "nothing to train on: choose task=NAME or experiment=NAME (--help shows them); "
            "experiment=quickstart is the one that takes minutes"
        )


def _warn_of_unread(config: DictConfig, overrides: Iterable[str]) -> None:
    """Say which settings were given for nothing."""
    given = {name: value for name, _, value in (override.lstrip("+").partition("=") for override in overrides)}
    for name, condition in unread(config, "train", given):
        needed = f"{condition.key}={as_yaml(condition.value)}"
        log.warning("%s=%s changes nothing: it is read if %s", name, given[name], needed)

    # What several agents or stages share is a setting of the run's, also where those at hand do not refer to it.
    of_agents, of_stages = {"tau", *(f"networks.{name}" for name in config.networks)}, {"updates", "online_updates"}
    agent, stages = (OmegaConf.to_yaml(part, resolve=False) for part in (config.agent, config.stages))
    for names, readers, read in ((of_agents, config.agent._target_, agent), (of_stages, "the stages", stages)):
        for name in given:
            if name in names and f"${{{name}}}" not in read:
                log.warning("%s=%s changes nothing: not read by %s", name, given[name], readers)


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

    def trained(part: str, stage: DictConfig) -> bool:
        return (stage.train == "all" or part in stage.train) and part not in stage.get("freeze", ())

    for number, (name, stage) in enumerate(stages):
        for part in stage.get("freeze", ()):
            if not any(trained(part, before) for _, before in stages[:number]):
                log.warning(
                    "stage '%s' freezes '%s', which nothing before it trains: it stays as it was drawn at random "
                    "(a stage before it, or ckpt=, brings a trained one)",
                    name,
                    part,
                )


def check(config: DictConfig) -> None:
    """Check the configuration of a training run: each setting, then what relates several of them.

    Raises:
        UserError: for a setting as `check_settings` says, no stages, several seeds where they cannot be stacked,
            a device or precision that this machine does not have, or nothing to compile with.
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
        if trainer.precision == "16-mixed":
            raise UserError("trainer.precision=16-mixed needs a GPU: choose 32-true or bf16-mixed")
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
