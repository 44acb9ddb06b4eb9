"""The command line: what it says in Hydra's grammar, and what is said of mistakes in it, in one line each."""

from __future__ import annotations

import difflib
import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deflow.config import CONFIG_DIR
from deflow.errors import UserError
from deflow.settings import check_settings, unknown_setting
from deflow.tables import look_first_in

FILLED_IN = ("agent.optimizer.parts", "agent.every", "stages.")
OF_THE_USER = (UserError, HydraException, OmegaConfBaseException)


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """What of a command line is neither a flag of Hydra's nor the value of one."""
    return list(_parsed(arguments).overrides)


def flags_of(arguments: Sequence[str]) -> list[str]:
    """The Hydra flags of a command line, with their values."""
    overrides = overrides_of(arguments)
    return [argument for argument in arguments if argument not in overrides]


def config_dir_of(arguments: Sequence[str]) -> str | None:
    """The folder that `--config-dir` names."""
    return _parsed(arguments).config_dir


def _parsed(arguments: Sequence[str]) -> Namespace:
    return get_args_parser().parse_known_intermixed_args(arguments)[0]


def look_in_own_folder(folder: str | Path | None) -> None:
    """Let a folder of the user's own, with files and tables, go first in all that is composed from now on; None: none.

    Raises:
        UserError: if there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir: no folder {folder}")
    look_first_in(Path(folder).absolute() if folder is not None else None)


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


def one_way(argument: str) -> str:
    """An argument as it is when numbers are written one way: `tau=2e-2` is `tau=0.02`; one with several as it came."""
    if not _parses(argument):
        return argument
    override = OverridesParser.create().parse_override(argument)
    if override.is_sweep_override() or override.is_delete():
        return argument
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


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


def refuse_other_overrides(overrides: Iterable[str]) -> None:
    """A run that is resumed keeps its own configuration; whatever else is asked for would be silently lost.

    Raises:
        UserError: if there are overrides other than `resume` and `trust`.
    """
    allowed = ("resume=", "trust=")  # what a file may name is not the file's to say
    others = [override for override in overrides if not override.startswith(allowed)]
    if others:
        raise UserError(f"resume= keeps the run's own configuration: drop {' '.join(others)}")


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
        missing = getattr(error.__cause__, "full_key", None) or unknown[1]  # a name within `{name: value}`
        if (said := _of_an_addition(command, arguments, unknown[1], missing)) is not None:
            return said
        known = _known_settings(command, arguments, without=unknown[1])
        return _beside_other_agents(unknown[1], known, str(unknown_setting(unknown[1], known)))
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return _unknown_choice(group, name, choices(group) or sorted(error.options))
    while not str(error) and error.__cause__ is not None:  # Hydra's wrapper of a grammar error says nothing itself
        error = error.__cause__
    message = str(error).removeprefix("UserError raised while resolving interpolation: ").partition("\n    full_key")[0]
    return re.sub(r"\s+", " ", message).strip()


def _beside_other_agents(key: str, known: Iterable[str], said: str) -> str:
    """`said` of a setting or group, and which agents have it if that at hand does not."""
    group, name, *_ = [*re.split("[./]", key), ""]
    if group != "agent" or any(other == f"agent.{name}" or other.startswith(f"agent.{name}.") for other in known):
        return said
    having = [agent for agent in choices("agent") if name in _settings_of_agent(agent)]
    if not having:
        return said
    of_others = f"agent={'|'.join(having)}"
    if "did you mean" in said:
        return f"{said} ({of_others} would have agent.{name})"
    return f"no setting '{key}' of this agent: it is one of {of_others}"


def _settings_of_agent(name: str) -> set[str]:
    """The first names of an agent's settings and groups."""
    path = Path(CONFIG_DIR) / "agent" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}  # one of the user's own
    found = set(content)
    for entry in content.get("defaults", []):
        found |= set(entry) if isinstance(entry, dict) else _settings_of_agent(entry)  # `_self_` has no file
    return found


def _unknown_choice(group: str, name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, 1, cutoff=0.75)
    meant = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown {group} '{name}'{meant}: choose one of {', '.join(options)}"


def _of_an_addition(command: str, arguments: Sequence[str], key: str, missing: str) -> str | None:
    """What is said of an override of `key` that adds `missing` to a group of free names; None: to no such group."""
    if not key.startswith(FILLED_IN):
        return None
    overrides = overrides_of(arguments)
    added = {override: f"++{override}" for override in overrides if override.startswith(FILLED_IN)}
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(CONFIG_DIR, version_base=None):
            config = compose(command, overrides=[_first_of(added.get(override, override)) for override in overrides])
        check_settings(config, command)
    except OF_THE_USER as error:
        return str(error) if str(error).startswith(f"{key} must be ") else None
    addition = next((f"+{override}" for override in added if override.startswith(f"{key}=")), None)
    return addition and f"no setting '{missing}' yet: add it, {shlex.quote(addition)}"


def _first_of(override: str) -> str:
    """An override as the first job of a sweep has it."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_discrete_sweep():
        return override
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}"


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
