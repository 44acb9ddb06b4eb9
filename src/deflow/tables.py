"""Tables: a YAML file whose rows are configurations of Hydra, in the place of a file for each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deflow.errors import UserError


def _config_dir() -> Path:
    """The folder of the YAML files: in the installed package, or at the top of the repository."""
    installed = Path(__file__).resolve().with_name("configs")
    return installed if installed.is_dir() else installed.parents[2] / "configs"


CONFIG_DIR = str(_config_dir())
OFFLINE_TO_ONLINE, ITS_SECOND_HALF = "offline_to_online", "online"  # choices of stages

_own: Path | None = None


def look_first_in(folder: Path | None) -> None:
    """Let a folder of the user's own, files and tables, go before the package's in whatever is composed from now on."""
    global _own
    _own = folder
    _configs.cache_clear()  # a notebook's tables change between two runs


def config_file(name: str) -> Path:
    """The file of a configuration, such as `agent/fql`: the user's own, or the package's, which may not be there."""
    own = _own / f"{name}.yaml" if _own is not None else None
    return own if own is not None and own.is_file() else Path(CONFIG_DIR) / f"{name}.yaml"


class Tables(ConfigSource):
    """The tables of a folder of configurations, to Hydra as if they were files; a file of the same name goes before.

    `task.yaml` has a row for each task, NAME: the settings below `task`. It gives
    - `task/NAME`, and `task/NAME/STAGES` for what the row changes under that choice of stages;
    - `data/NAME`, the choice of the group data that the row names, so that `data: ${task}` is the task's own data;
    - `experiment/NAME`, the same as `task=NAME`;
    - `experiment/online/NAME`, if the row says what changes under `stages=offline_to_online`.
    What changes there also changes under `stages=online`, the second half of it, unless the row says otherwise.

    `tuned/AGENT.yaml` has a row for each task with what is tuned for that agent on it: `tuned/AGENT/NAME` and
    `tuned/AGENT/NAME/STAGES`. Keys may be dotted. A row may have several names, separated by commas, and one whose name
    begins with a dot is only there for others to refer to.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.configs = _configs(Path(self.path))

    @staticmethod
    def scheme() -> str:
        return "tables"

    def available(self) -> bool:
        return True

    def is_config(self, config_path: str) -> bool:
        return config_path in self.configs

    def is_group(self, config_path: str) -> bool:
        return any(path.startswith(f"{config_path}/") for path in self.configs)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "data":  # that a task's name stands for its data is nothing to choose
            return []
        prefix = f"{config_path}/".removeprefix("/")
        below = [path.removeprefix(prefix) for path in self.configs if path.startswith(prefix)]
        groups = {name.partition("/")[0] for name in below if "/" in name}
        configs = {name for name in below if "/" not in name}
        found = {ObjectType.CONFIG: configs, ObjectType.GROUP: groups, None: configs | groups}
        return sorted(found[results_filter])

    def load_config(self, config_path: str) -> ConfigResult:
        package = None if config_path.startswith("data/") else "_global_"
        config = _nested(self.configs[config_path])
        return ConfigResult(self.provider, self.full_path(), config, {"package": package})


class TablesBesideFiles(SearchPathPlugin):
    """Hydra looks for a command's configurations in the tables of the folder where it looks for files.

    It looks first of all in the user's own folder, if there is one.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folders = [element.path for element in search_path.get_path() if element.provider == "main"]
        for folder in folders:
            search_path.append("tables", f"{Tables.scheme()}://{folder}")
        if folders and _own is not None:
            for scheme in ("file", Tables.scheme()):
                search_path.prepend("own", f"{scheme}://{_own}", anchor="main")


Plugins.instance().register(Tables)
Plugins.instance().register(TablesBesideFiles)


@cache
def _configs(root: Path) -> dict[str, dict[str, Any]]:
    """Path of each configuration -> its content, keys still dotted."""
    configs: dict[str, dict[str, Any]] = {}
    for name, row in read_table(root / "task.yaml"):
        if "data" not in row:
            raise UserError(f"{root / 'task.yaml'}: {name} needs data, a choice of the group data, such as data: npz")
        configs |= _of_task(name, row, _stages(root))
    for table in (root / "tuned").glob("*.yaml"):
        for name, row in read_table(table):
            configs |= _with_stages(f"tuned/{table.stem}/{name}", row, _stages(root))
    return configs


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each row; a row of several names comes once for each.

    Raises:
        UserError: if it is no table.
    """
    if not path.is_file():
        return
    try:
        rows: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path} must have rows such as NAME: {{key: value}}")
    named = ((name.strip(), row) for names, row in rows.items() for name in str(names).split(","))
    yield from ((name, row) for name, row in named if not name.startswith("."))


def _of_task(name: str, row: dict[str, Any], stages: set[str]) -> dict[str, dict[str, Any]]:
    chosen = {"defaults": [{"override /task": name}]}
    row = {"name": name, **row}
    configs: dict[str, dict[str, Any]] = {
        f"data/{name}": {"defaults": [row.pop("data")]},
        f"experiment/{name}": chosen,
    }
    if OFFLINE_TO_ONLINE in row:
        configs[f"experiment/online/{name}"] = {
            "defaults": [*chosen["defaults"], {"override /stages": OFFLINE_TO_ONLINE}],
            "name": f"online/{name}",
        }
    for path, settings in _with_stages(f"task/{name}", row, stages).items():
        configs[path] = {f"task.{key}": value for key, value in settings.items()}
    return configs


def _with_stages(path: str, row: dict[str, Any], stages: set[str]) -> dict[str, dict[str, Any]]:
    """The row itself at `path`, and what it changes for a choice of stages at `path/STAGES`."""
    always = {key: value for key, value in row.items() if key not in stages}
    if OFFLINE_TO_ONLINE in row:
        row = {ITS_SECOND_HALF: row[OFFLINE_TO_ONLINE], **row}
    return {path: always} | {f"{path}/{key}": row[key] for key in row.keys() & stages}


def _stages(root: Path) -> set[str]:
    """Choices of stages: the folder's, and the package's."""
    return {path.stem for folder in (root, Path(CONFIG_DIR)) for path in (folder / "stages").glob("*.yaml")}


def _nested(content: dict[str, Any]) -> DictConfig:
    config = OmegaConf.create()
    for key, value in content.items():
        OmegaConf.update(config, key, value)
    return config
