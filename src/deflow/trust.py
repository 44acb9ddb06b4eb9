"""Whose code may run because a file names it: this package's, and that of packages which the command line trusts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import gymnasium

from deflow.errors import UserError

# Packages whose environments and wrappers a file may name.
ENVIRONMENTS = ("gymnasium", "gymnasium_robotics", "ogbench", "minigrid", "ale_py")
HINT = "a package of your own is named on the command line, trust=[PACKAGE]"

_trusted: tuple[str, ...] = ()


def trust_only(packages: Sequence[str]) -> None:
    """Let files name code of `packages`, and of no others, from now on in this process.

    Args:
        packages: dotted names, as the command line gives them in `trust=[...]`; never taken from a file.

    Raises:
        UserError: if these are not names of packages.
    """
    global _trusted
    names = [packages] if isinstance(packages, str) else list(packages)
    if not all(isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) for name in names):
        raise UserError(f"trust= takes names of packages, as in trust=[mylab], got {packages}")
    _trusted = tuple(names)


def as_arguments() -> list[str]:
    """The arguments by which another command trusts the same packages; no file ever holds them."""
    return [f"trust=[{','.join(_trusted)}]"] if _trusted else []


def is_trusted(dotted: str) -> bool:
    """Whether `dotted` names a trusted package or something in one."""
    return _is_in(dotted, _trusted)


def check_environment_id(name: str, where: str) -> None:
    """Refuse a gymnasium id such as `module:Name-v0`, for which the module is imported, if that is not trusted.

    Args:
        name: from a file.
        where: the file and the key, for the message.

    Raises:
        UserError: for a module that is neither one of `ENVIRONMENTS` nor trusted.
    """
    module, colon, _ = name.partition(":")
    if colon and not _is_in(module, (*ENVIRONMENTS, *_trusted)):
        raise UserError(f"{where} names code of '{module}', {name}, which a file may not: {HINT}")


def check_environment_spec(text: str, where: str) -> None:
    """Refuse a gymnasium environment stored as JSON, if it would call something else than environments and wrappers.

    Args:
        text: what `EnvSpec.to_json` gave.
        where: the file and the key, for the message.

    Raises:
        UserError: for an entry point that is neither an environment or a wrapper of `ENVIRONMENTS` nor trusted.
    """
    try:
        entry_points = list(_entry_points(json.loads(text)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} does not describe an environment") from error
    for entry_point in entry_points:
        module, _, name = entry_point.partition(":")
        if not is_trusted(module) and not (_is_in(module, ENVIRONMENTS) and _is_environment(module, name)):
            raise UserError(f"{where} names {entry_point}, which is no known environment or wrapper: {HINT}")


def _entry_points(spec: dict[str, Any]) -> Iterator[str]:
    for part in (spec, *spec["additional_wrappers"]):
        if part["entry_point"] is not None:
            yield str(part["entry_point"])


def _is_environment(module: str, name: str) -> bool:
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:  # what is not installed does not run: whoever makes the environment says what is missing
        return True
    return isinstance(found, type) and issubclass(found, gymnasium.Env)  # a wrapper is one, too


def _is_in(dotted: str, packages: Sequence[str]) -> bool:
    return any(dotted == package or dotted.startswith(f"{package}.") for package in packages)
