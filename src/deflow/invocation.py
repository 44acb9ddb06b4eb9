"""How a command was started: by a script at the top of the repository, or by the console's `deflow COMMAND`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from hydra.core.hydra_config import HydraConfig

_typed = ""  # the command behind `deflow`; empty if a script was started


def started_by_console(command: str) -> None:
    """Remember the command that was typed behind `deflow`."""
    global _typed
    _typed = command


def typed_command() -> str:
    """The command that was typed behind `deflow`; empty if a script was started."""
    return _typed


def command_line() -> str:
    """The command that Hydra has composed, in one line that a shell takes; empty in a program or a notebook."""
    if not HydraConfig.initialized():
        return ""
    job = HydraConfig.get()
    return typed(str(job.job.config_name), (word for word in job.overrides.task if "\n" not in word))


def typed(script: str, arguments: Iterable[str]) -> str:
    """A command with these arguments, in one line that a shell takes."""
    return shlex.join([*as_script_and_as_typed(script)[1].split(), *arguments])


def as_script_and_as_typed(script: str) -> tuple[str, str]:
    """`python NAME.py`, and what stands in its place in what the user is told to type."""
    as_script = f"python {script}.py"
    return as_script, f"deflow {_typed}" if _typed else as_script
