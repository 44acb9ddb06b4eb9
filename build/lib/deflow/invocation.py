"""How a command was started: by a script at the top of the repository, or by the console's `deflow COMMAND`."""

from __future__ import annotations

_typed = ""  # the command behind `deflow`; empty if a script was started


def started_by_console(command: str) -> None:
    """Remember the command that was typed behind `deflow`."""
    global _typed
    _typed = command


def typed_command() -> str:
    """The command that was typed behind `deflow`; empty if a script was started."""
    return _typed


def as_script_and_as_typed(script: str) -> tuple[str, str]:
    """`python NAME.py`, and what stands in its place in what the user is told to type."""
    as_script = f"python {script}.py"
    return as_script, f"deflow {_typed}" if _typed else as_script
