"""What a shared policy does not tell of whoever trained it: places on a machine, passwords, tokens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, TypeVar

Plain = TypeVar("Plain")

LEFT_OUT = "..."  # what stands in its place

# A setting of a command whose value is a place or an account, whatever it looks like.
PLACE = re.compile(r"\+*(?:data\.source\.(?:path|dir|url)|(?:paths|hydra|logger)\.[\w.]+|ckpt|resume)")
# An absolute path in a text; what stands before its first slash is no part of a relative one, nor of an address.
ABSOLUTE = re.compile(r"(?<![^\s='\"\[{(,])(?:/|~\w)|(?<=:)/(?!/)|(?<=://)/")
COLUMNS = "keys"  # of own data: names in a file, which may begin with a slash, too


def without_private(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what loading never reads, and whatever else is nobody's business.

    The home folder is `~`; other absolute paths are left out. Addresses lose user, password and query.
    """
    unread = {"paths": {}, "ckpt": None, "resume": None, "logger": {"_target_": config["logger"]["_target_"]}}
    return _anonymous(config | {key: value for key, value in unread.items() if key in config})


def without_places(command: str) -> str:
    """A command that does not tell where things lie, on a machine or elsewhere; empty if no shell would take it."""
    try:
        return shlex.join(map(_without_place, shlex.split(command)))
    except ValueError:  # a quote that is not closed
        return ""


def _without_place(word: str) -> str:
    name, equals, value = word.partition("=")
    if not equals:
        return LEFT_OUT if word.startswith("/") or "://" in word else word
    is_place = PLACE.fullmatch(name) or ABSOLUTE.search(value) or "~/" in value or "://" in value
    return f"{name}={LEFT_OUT}" if is_place else word


def _anonymous(value: Plain) -> Plain:
    if isinstance(value, str):
        return _anonymous_text(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: item if key == COLUMNS else _anonymous(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [_anonymous(item) for item in value]  # type: ignore[return-value]
    return value


def _anonymous_text(text: str) -> str:
    # To the last @: a password may hold others, and slashes. What follows a question mark may be a token.
    text = re.sub(r"(?<=://)\S*@", "", text)
    text = re.sub(r"(://[^\s?#]*)[?#]\S*", r"\1", text)
    home = Path.home().as_posix()
    if f"{text}/".startswith(f"{home}/"):
        text = f"~{text.removeprefix(home)}"
    return LEFT_OUT if ABSOLUTE.search(text) else text
