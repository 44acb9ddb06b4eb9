"""`--help`: one screen about a command, made of the words in its YAML file and of what Hydra composes from it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deflow.tables import config_file

WIDTH = 100  # columns of the screen
SETTING = 34  # columns of `key=value`
DEEPEST = 2  # names of a key that is shown
MORE = "--help KEY=VALUE ... shows the values under these; --cfg job all there is; --hydra-help Hydra's own"
GROUP = re.compile(r"^  - (?P<name>\w+): \S+(?: +# (?P<comment>.*))?$", re.MULTILINE)
VARIANT = re.compile(r"^defaults: \[(?P<choice>\w+)\]$", re.MULTILINE)
LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+): *(?P<value>[^#\n]*?) *(?:# (?P<comment>.*))?$", re.MULTILINE)


def help_text(configs: Path, command: str, overrides: Sequence[str]) -> str:
    """What the command does, its groups and their choices, its settings with their values.

    Args:
        configs: folder of the YAML files.
        command: name of one of them.
        overrides: as on the command line, such as `experiment=scene`. The values are those under them, and the task's
            and the agent's are shown in the place of the groups.

    Raises:
        HydraException: for an override that cannot be.
    """
    text = (configs / f"{command}.yaml").read_text()
    with initialize_config_dir(str(configs), version_base=None):
        config = compose(command, overrides=list(overrides), return_hydra_config=True)
        chosen = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
        if overrides:
            lines = [*_header(text)[:1], "", f"With {' '.join(overrides)}:", *_task(config), *_settings(text, config)]
            lines += _agent(chosen, config)
        else:
            lines = [*_header(text), *_groups(text, chosen), "", _title(config), *_settings(text, config)]
    return "\n".join([*lines, "", MORE])


def _header(text: str) -> list[str]:
    """The comment at the head of the file."""
    return [line.removeprefix("#").removeprefix(" ") for line in takewhile(_is_comment, text.splitlines())]


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _groups(text: str, chosen: Mapping[str, str]) -> Iterator[str]:
    """A paragraph for each group in the file's list of defaults, and for those inside them, that leaves a choice."""
    comments = {match["name"]: match["comment"] for match in GROUP.finditer(text) if match["name"] != "hydra"}
    inside = [group for group in chosen if "/" in group and "@" not in group]
    groups = [each for group in comments for each in (group, *(one for one in inside if one.startswith(f"{group}/")))]
    lines = [line for group in groups for line in _paragraph(group, comments.get(group))]
    yield from ["", "Groups, as group=choice:", *lines] if lines else []


def _paragraph(group: str, comment: str | None) -> list[str]:
    names = _choices(group)
    if len(names) == 1:
        return []
    return _wrapped(group.replace("/", "."), f"{comment + ': ' if comment else ''}{' '.join(_by_family(names))}")


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"  {name:<12} {text}", WIDTH, subsequent_indent=15 * " ", break_on_hyphens=False)


def _choices(group: str) -> list[str]:
    """Names that the group takes, but for an experiment's that are a task's."""
    options = GlobalHydra.instance().config_loader().get_group_options
    if group != "experiment":
        return options(group)
    return [*(name for name in options(group) if name not in options("task")), "TASK", "online/TASK"]


def _by_family(names: Sequence[str]) -> list[str]:
    """Names with what they share said once, as shells have it: `{antmaze,pointmaze}_{large,medium}`."""
    prefixes: dict[str, list[str]] = {}  # of what follows them
    for prefix, family in groupby(names, key=lambda name: re.split(r"(?<=[-_])", name)[0]):
        rest = _braces([name.removeprefix(prefix) for name in family])
        prefixes.setdefault(f"{prefix[-1]}{rest}" if rest else prefix, []).append(prefix[:-1] if rest else "")
    return [f"{_braces(before)}{rest}" for rest, before in prefixes.items()]


def _braces(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    version = re.search(r"-v\d+$", names[0])
    suffix = version[0] if version and all(name.endswith(version[0]) for name in names) else ""
    return f"{{{','.join(name.removesuffix(suffix) for name in names)}}}{suffix}"


def _title(config: DictConfig) -> str:
    task = config.get("task")
    return f"Settings, as key=value; here of task={task.name}:" if task else "Settings, as key=value:"


def _task(config: DictConfig) -> Iterator[str]:
    """The task's own settings; a table has no room for comments."""
    if config.get("task") is not None:
        yield from _wrapped("task", " ".join(f"{key}={_shown(_value(config.task, key))}" for key in config.task))


def _agent(chosen: Mapping[str, str], config: DictConfig) -> Iterator[str]:
    """The settings in the files of the agent and of its components, each once, as its component's file says it."""
    lines: dict[str, str] = {}
    for group in sorted(group for group in chosen if group.partition("/")[0] == "agent" and "@" not in group):
        found = _settings(_text(group, chosen[group]), config, f"{group.replace('/', '.')}.")
        lines |= {line.partition("=")[0]: line for line in found}
    yield from lines.values()


def _text(group: str, choice: str) -> str:
    """A configuration's file, or that of the choice of which it is a variant and which has all its settings."""
    path = config_file(f"{group}/{choice}")
    text = path.read_text() if path.exists() else ""
    of = VARIANT.search(text)
    return _text(group, of["choice"]) if of else text


def _settings(text: str, config: DictConfig, section: str = "") -> Iterator[str]:
    """A line for each setting in the text of a YAML file, with its value in `config` and its comment.

    Of a component, whose `section` goes before its keys, those that follow a setting elsewhere are left out.
    """
    parents: list[str] = []
    for match in LINE.finditer(text):
        parents[len(match["indent"]) // 2 :] = [match["key"]]
        follows = match["key"].startswith("_") or (section and "${" in match["value"])
        if match["value"] and not follows and len(parents) <= DEEPEST:
            yield _setting(config, section + ".".join(parents), match["comment"] or "")


def _setting(config: DictConfig, key: str, comment: str) -> str:
    setting = f"{key}={_shown(_value(config, key))}"
    return f"  {setting:<{SETTING}}  {_clauses(comment, WIDTH - max(SETTING, len(setting)) - 4)}".rstrip()


def _clauses(comment: str, room: int) -> str:
    """As much of the comment as there is room for, in whole clauses."""
    for mark in ("; ", ", "):
        while len(comment) > room and mark in comment:
            comment = comment.rpartition(mark)[0]
    return textwrap.shorten(comment, max(room, 3), placeholder="...")


def _value(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key, throw_on_missing=True)
    except OmegaConfBaseException:
        return "???"


def _shown(value: Any) -> str:
    """A value as it may be typed."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f"{value:_}"
    return f"[{','.join(map(_shown, value))}]" if OmegaConf.is_list(value) else str(value)
