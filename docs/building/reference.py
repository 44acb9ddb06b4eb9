"""The reference pages, made of what the repository says of itself: comments in configs/, docstrings of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from deflow.commands import COMMANDS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"

LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^#\s].*?))?(?: +# (?P<comment>.*))?$")
REMARK = re.compile(r"^ *# ?(.*)$")
DEFAULT = re.compile(r"^  - (?P<group>[\w/@]+): (?P<choice>\S+)(?: +# (?P<comment>.*))?$", re.MULTILINE)
VARIANT = re.compile(r"^defaults: *\n?(?: *- |\[)(?P<of>[\w, ]+)\]?$", re.MULTILINE)
TARGET = re.compile(r"^ *_target_: (\S+)$", re.MULTILINE)
DOCUMENTED = ("deflow.agents.", "deflow.modules.")

# Title and folders of configs/ on each page; what a file's keys are below, if it is not the folder's name.
SETTINGS = {
    "agent": (
        *("agent", "agent/behavior_flow", "agent/critic", "agent/value", "agent/actor", "agent/dynamics"),
        "agent/optimizer",
    ),
    "data": ("data", "datamodule", "own_data"),
    "stages": ("stages",),
    "others": ("solver", "iav", "trainer", "logger", "engine"),
}
BELOW = {"datamodule": "data", "own_data": "data.source"}
WORDS = {
    "agent": "The algorithm. What is tuned for a task stands in `configs/tuned/NAME.yaml` and goes before these.",
    "datamodule": "What every choice of `data` has.",
    "own_data": "What the sources of data of your own have in common: `data=npz`, `hdf5`, `robomimic` and `lerobot`.",
    "engine": "Of `reproduce.py`: where runs are made.",
}


class Setting(NamedTuple):
    """A line of a YAML file."""

    key: str
    value: str
    comment: str


def pages() -> dict[str, str]:
    """Markdown of every page, by its path in the site."""
    found = {f"settings/{page}.md": _settings_page(page, folders) for page, folders in SETTINGS.items()}
    return found | {
        "settings/train.md": _train_page(),
        "commands.md": _commands_page(),
        "api/agents.md": _agents_page(),
        "api/modules.md": _modules_page(),
    }


def settings(text: str, below: str = "") -> Iterator[Setting]:
    """The settings in the text of a YAML file, with the comments beside, after and above them."""
    parents: list[str] = []
    above: list[str] = []
    last: Setting | None = None
    column = -1  # of the last setting's comment
    for line in _body(text).splitlines():
        if remark := REMARK.match(line):
            if last is not None and line.index("#") == column:
                last = last._replace(comment=f"{last.comment} {remark[1]}")
            else:
                above.append(remark[1])
            continue
        if last is not None:
            yield last
        last, column = None, -1
        match = LINE.match(line)
        if match is None:
            continue
        parents[len(match["indent"]) // 2 :] = [match["key"]]
        if match["key"].startswith("_"):
            continue
        comment = " ".join([*above, match["comment"] or ""]).strip()
        if match["value"] or comment:
            last = Setting(".".join([below, *parents] if below else parents), match["value"] or "", comment)
            column = line.rindex("# ") if match["comment"] else -1
        above = []
    if last is not None:
        yield last


def _body(text: str) -> str:
    """A YAML file's text without the comment at its head and its list of defaults."""
    lines = text.splitlines()
    rest = lines[len(list(takewhile(_is_remark, lines))) :]
    body, inside = [], False
    for line in rest:
        if line.startswith("defaults:"):
            inside = True
        elif not line.startswith(" "):
            inside = False
        if not inside:
            body.append(line)
    return "\n".join(body)


def _is_remark(line: str) -> bool:
    return line.startswith("#")


def _header(text: str) -> list[str]:
    """The comment at the head of a file."""
    head = (REMARK.match(line) for line in takewhile(_is_remark, text.splitlines()))
    return [line[1] for line in head if line and not line[1].startswith("@package")]


def _table(rows: list[Setting]) -> str:
    if not rows:
        return ""
    lines = (f"| `{row.key}` | {_code(row.value)} | {_cell(row.comment)} |" for row in rows)
    return "\n".join(["| setting | value | |", "|---|---|---|", *lines]) + "\n"


def _code(value: str) -> str:
    return f"`{_cell(value)}`" if value else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _settings_page(page: str, folders: tuple[str, ...]) -> str:
    names = "`, `".join(folders if page == "others" else (page,))
    parts = [f"# Settings: `{names}`", "Made of the comments in `configs/`. A value `${...}` follows another setting."]
    for folder in folders:
        below = BELOW.get(folder, folder.replace("/", "."))
        parts += [f"## `{folder.replace('/', '.')}`", WORDS.get(folder, "")]
        for path in sorted((CONFIGS / folder).glob("*.yaml")):
            parts += _choice(folder, path, below)
    return "\n\n".join(part for part in parts if part) + "\n"


def _choice(folder: str, path: Path, below: str) -> Iterator[str]:
    text = path.read_text()
    if folder not in BELOW:
        yield f"### `{folder.replace('/', '.')}={path.stem}`"
    yield " ".join(_header(text)).replace("  ", " ")
    table = _table([*settings(text, below)])
    yield from _made_of(folder.partition("/")[0], text, "" if table else ".")
    yield table


def _made_of(group: str, text: str, end: str) -> Iterator[str]:
    """What a file takes from others, and the class that its settings are arguments of."""
    if variant := VARIANT.search(text):
        yield f"As `{variant['of']}`{end or ', but:'}"
    parts = [
        f"`{group}.{part['group']}={part['choice']}`" for part in DEFAULT.finditer(text) if "@" not in part["group"]
    ]
    if parts:
        yield f"With {', '.join(parts)}."
    if targets := TARGET.findall(text):
        yield f"Arguments of {', '.join(map(_reference, targets))}."


def _reference(target: str) -> str:
    name = f"`{target.rpartition('.')[2]}`"
    return f"[{name}][{target}]" if target.startswith(DOCUMENTED) and "optimizer" not in target else f"`{target}`"


def _train_page() -> str:
    text = (CONFIGS / "train.yaml").read_text()
    groups = [match for match in DEFAULT.finditer(text) if match["comment"] and "@" not in match["group"]]
    rows = (f"| `{match['group']}` | `{_cell(match['choice'])}` | {match['comment']} |" for match in groups)
    return "\n\n".join(
        [
            "# Settings: `train`",
            "Made of the comments in `configs/train.yaml`. `python train.py task=NAME --help` shows a task's values.",
            "## Groups",
            "As `group=choice`: tasks and experiments are in [the table](../index.md#use), others on the next pages.",
            "\n".join(["| group | choice | |", "|---|---|---|", *rows]),
            "## Settings",
            _table([*settings(text)]),
        ]
    )


def _commands_page() -> str:
    parts = [
        "# Commands",
        "`deflow NAME` after an installation is `python NAME.py` in the repository. Every command has `--help`, and a "
        "wrong name or value is refused in one line before anything is made.",
    ]
    for name, command in COMMANDS.items():
        text = (CONFIGS / f"{command.__name__.strip('_')}.yaml").read_text()
        usage = "\n".join(f"    {line}".rstrip() for line in _header(text) if line.strip().startswith("python "))
        parts += [f"## `deflow {name}`", command.__doc__ or "", usage]
        parts.append("[All settings](settings/train.md)" if name == "train" else _table([*settings(text)]))
    return "\n\n".join(parts) + "\n"


def _agents_page() -> str:
    texts = (path.read_text() for path in sorted((CONFIGS / "agent").glob("*.yaml")))
    targets = (target for text in texts for target in TARGET.findall(text))
    names = dict.fromkeys(target for target in targets if target.startswith("deflow.agents."))
    listed = "\n\n".join(f"::: {name}" for name in names)
    return f"# Agents\n\nThe losses as formulas: [The losses](../losses.md).\n\n{listed}\n"


def _modules_page() -> str:
    files = sorted((ROOT / "src/deflow/modules").glob("[a-z]*.py"))
    listed = "\n\n".join(
        f"::: deflow.modules.{path.stem}\n    options: {{show_root_toc_entry: false}}" for path in files
    )
    return f"# Modules\n\nThe parts that agents are made of.\n\n{listed}\n"
