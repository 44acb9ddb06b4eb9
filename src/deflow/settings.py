"""A configuration compared with its typed description: which settings there are, and which values each may have.

What a constructor takes is described by its own signature (a new agent needs no line anywhere), everything else by the
sections of `sections.py`. `check_settings` compares a composed configuration with both.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from deflow.errors import UserError
from deflow.ranges import (
    Count,
    ReadIf,
)
from deflow.sections import (
    AUTO,
    OPTIMIZERS,
    SETTINGS_OF,
    STAND_IN,
    TRAINER,
    Component,
    OptimizerArguments,
    TrainerArguments,
)

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")

# Settings beside a component's arguments, which `build_agent` takes out.
OF_THE_BUILDER: dict[str, dict[str, Any]] = {"agent": {"horizon": Count}}


def check_settings(config: DictConfig | Mapping[str, Any], command: str) -> None:
    """Compare the whole configuration of a command with its description.

    Args:
        config: as Hydra composed it.
        command: one of `SETTINGS_OF`.

    Raises:
        UserError: for the first setting that is missing, not known, or has a value that it may not have.
    """
    for setting in described(_plain(config), SETTINGS_OF[command]):
        check_value(*setting)


def check_component(settings: DictConfig | Mapping[str, Any], key: str) -> None:
    """Check a component as `check_settings` does: `settings` hold its `_target_`, and `key` is where they belong."""
    for setting in described(_plain(settings), Component, key):
        check_value(*setting)


def unread(config: DictConfig, command: str, names: Iterable[str]) -> Iterator[tuple[str, ReadIf]]:
    """The settings among `names` that do nothing because of another one's value, and what it would have to be."""
    settings = {key: (value, type_) for key, value, type_ in described(_plain(config), SETTINGS_OF[command])}
    for name in names:
        _, type_ = settings.get(name, (None, None))
        for condition in getattr(type_, "__metadata__", ()):
            if isinstance(condition, ReadIf):
                beside = _dotted(name.rpartition(".")[0], condition.key)
                key = beside if beside in settings else condition.key
                value, _ = settings.get(key, (None, None))
                if key not in settings or value != condition.value:
                    yield name, condition._replace(key=key)


def described(value: Any, type_: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`(dotted key, value, type)` of every setting in `value`; the type is None for what is not described.

    Args:
        value: plain settings.
        type_: of `value`: a section above, a component, or a type of plain values.
        key: of `value`.

    Raises:
        UserError: if there is a key that the description does not know, or a section lacks one.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        yield from _each(value, _arguments(key, value), key)
    elif isinstance(value, Mapping) and (section := _section(type_)) is not None:
        types = _hints(section)
        for name, of_name in types.items():
            if get_origin(of_name) is NotRequired:
                types[name] = get_args(of_name)[0]
            elif name not in value:
                raise UserError(f"the setting '{_dotted(key, name)}' is missing")
        yield from _each(value, types, key)
    elif value and isinstance(value, Mapping) and get_origin(type_) is Mapping:
        for name, item in value.items():
            yield from described(item, get_args(type_)[1], _dotted(key, name))
    elif value and isinstance(value, list) and get_origin(type_) is Sequence and _section(get_args(type_)[0]):
        for number, item in enumerate(value):
            yield from described(item, get_args(type_)[0], f"{key}[{number}]")
    else:
        yield key, value, type_


def check_value(key: str, value: Any, type_: Any) -> None:
    """Raise `UserError` unless `value` is of the type, strictly: no text for a number, no 60.5 for a whole one."""
    if type_ is None or (value == AUTO and key.removeprefix("agent.") in STAND_IN):
        return
    if not _is_plain(type_):  # an object: a component makes it
        if not isinstance(value, Mapping | list | None):
            raise UserError(f"{key} must be a component, with a _target_ and its settings, got {value!r}")
        return
    try:
        TypeAdapter(_without_sections(type_), config=STRICT).validate_python(value)
    except ValidationError as error:
        shown = "null" if value is None else repr(value)
        or_auto = f" or {AUTO}" if key.removeprefix("agent.") in STAND_IN else ""
        raise UserError(f"{key} must be {wanted(type_)}{or_auto}, got {shown}") from error


def unknown_setting(key: str, known: Iterable[str]) -> UserError:
    """The error of a key that is not among `known` (all of them dotted), with what was probably meant."""
    known = list(known)
    parent, _, name = key.rpartition(".")
    while parent and not _children(parent, known):
        parent = parent.rpartition(".")[0]
    known = [other for other in known if other != key]
    beside = _children(parent, known)
    near = [_dotted(parent, other) for other in difflib.get_close_matches(name, beside)]
    near += [other for other in known if other.rpartition(".")[2] == name]
    # A group that is there is not what was meant, one that is null may be.
    others = [other for other in known if not (key.startswith(f"{other}.") and _children(other, known))]
    near += difflib.get_close_matches(key, others, cutoff=0.8)
    meant = f"did you mean '{near[0]}'?" if near else f"choose among {', '.join(_dotted(parent, b) for b in beside)}"
    return UserError(f"no setting '{key}': {meant}")


def wanted(type_: Any) -> str:
    """What a value of the type is, in words."""
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return " ".join([wanted(arguments[0]), *_limits(type_.__metadata__)])
    if origin is Literal:
        return " or ".join(as_yaml(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " or ".join(wanted(argument) for argument in arguments)
    if origin is Sequence:
        return f"a list, each {wanted(arguments[0])}"
    if origin is Mapping or is_typeddict(type_):
        return "a group of settings"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(type_, as_yaml(None))


def _limits(metadata: Iterable[Any]) -> Iterator[str]:
    """The bounds in the metadata of an annotated type, in words."""
    fields = [field for field in metadata if isinstance(field, FieldInfo)]
    limits = {name: value for field in fields for one in field.metadata for name, value in asdict(one).items()}
    if limits.keys() >= {"ge", "le"}:
        yield f"from {limits['ge']} to {limits['le']}"
        return
    words = {
        "ge": "of at least",
        "gt": "above",
        "le": "and at most",
        "lt": "and below",
        "multiple_of": "and a multiple of",
    }
    yield from (f"{words[name]} {limits[name]}" for name in words if name in limits)
    if "min_length" in limits:
        yield f"({limits['max_length']} of them)" if "max_length" in limits else "(not empty)"


def as_yaml(value: Any) -> str:
    """A plain value as it stands in a YAML file."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _each(values: Mapping[str, Any], types: Mapping[str, Any], key: str) -> Iterator[tuple[str, Any, Any]]:
    """All settings of a group, in the order of the description."""
    given = {name: value for name, value in values.items() if name not in HYDRA_KEYS}
    for name in given:
        if name not in types:
            raise unknown_setting(_dotted(key, name), [_dotted(key, known) for known in types])
    for name, type_ in types.items():
        if name in given:
            yield from described(given[name], type_, _dotted(key, name))


def _arguments(key: str, component: Mapping[str, Any]) -> dict[str, Any]:
    """Type of each argument that a component takes; None for one that its signature does not describe."""
    target = component["_target_"]
    if target == TRAINER:
        return _hints(TrainerArguments)
    if str(target).startswith("torch.") and target not in OPTIMIZERS:
        raise UserError(f"{_dotted(key, '_target_')} must be one of {', '.join(OPTIMIZERS)}, got {target}")
    if target not in OPTIMIZERS and not str(target).startswith("deflow."):
        return dict.fromkeys(component)  # of the user's own package, which knows best
    try:
        constructor = get_object(target)
    except ImportError as error:
        raise UserError(f"{_dotted(key, '_target_')}: {error}") from error
    parameters = inspect.signature(constructor).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.name != "spec"]  # that is the task's
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names += component  # it takes whatever is given
    is_plain_class = inspect.isclass(constructor) and not is_dataclass(constructor)
    hints = _hints(constructor.__init__ if is_plain_class else constructor)  # fields may come from another module
    if target in OPTIMIZERS:
        hints = {name: type_ for name, type_ in hints.items() if _is_plain(type_)} | _hints(OptimizerArguments)
    return {name: hints.get(name) for name in names} | OF_THE_BUILDER.get(key, {})


def _hints(of: Any) -> dict[str, Any]:
    return get_type_hints(of, include_extras=True)


def _section(type_: Any) -> Any:
    """The section among the alternatives of a type, if there is one."""
    alternatives = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
    return next((one for one in alternatives if is_typeddict(one)), None)


def _is_plain(type_: Any) -> bool:
    """Whether values of the type can stand in a YAML file."""
    origin = get_origin(type_)
    if origin is Annotated:
        return _is_plain(get_args(type_)[0])
    if origin in (Union, UnionType, Sequence, Mapping, list, dict):
        return all(_is_plain(argument) for argument in get_args(type_))
    return origin is Literal or is_typeddict(type_) or type_ in (int, float, bool, str, Any, NoneType, None)


def _without_sections(type_: Any) -> Any:
    """The same type with a mapping in the place of each section, whose settings are checked one by one."""
    if is_typeddict(type_):
        return Mapping[str, Any]
    origin, arguments = get_origin(type_), tuple(_without_sections(argument) for argument in get_args(type_))
    if origin in (Union, UnionType):
        return Union[arguments]  # noqa: UP007 (of a computed tuple)
    return origin[arguments] if origin in (Sequence, Mapping) else type_


def _plain(config: DictConfig | Mapping[str, Any]) -> Any:
    if not isinstance(config, DictConfig):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"Missing mandatory value: {error.full_key}") from error


def _children(parent: str, keys: Iterable[str]) -> list[str]:
    """Names right below `parent` among dotted keys."""
    prefix = f"{parent}." if parent else ""
    return list(dict.fromkeys(key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)))


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
