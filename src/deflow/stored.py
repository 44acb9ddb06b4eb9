"""Configurations that come from files: a run's config.yaml, a checkpoint's. Components are built from them, so whatever
a file names is code that would run; here is what it may name."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_object
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from deflow.agents.base import Agent
from deflow.agents.optimizer import PartwiseAdam
from deflow.data.datamodule import OfflineDataModule
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.flow.ode import Solver
from deflow.sections import OPTIMIZERS, TRAINER
from deflow.trust import HINT, check_environment_id, is_trusted

PACKAGE = Path(__file__).parent
KINDS = (nn.Module, Source, OfflineDataModule, Solver, PartwiseAdam)  # classes of this package that configurations name
LOGGERS = tuple(
    f"deflow.loggers.{name}" for name in ("csv_only", "mlflow_logger", "tensorboard_logger", "wandb_logger")
)
FUNCTIONS = (*LOGGERS, TRAINER, *OPTIMIZERS)  # whatever else they name

# What builds a run: these must be there, and of these kinds.
ROLES: dict[str, type] = {"agent": Agent, "data": OfflineDataModule, "data.source": Source, "trainer": Trainer}

# What older configurations call components that have moved since.
MOVED = {
    "deflow.data.ogbench.OGBenchSource": "deflow.data.sources.ogbench.OGBenchSource",
    "deflow.data.d4rl.D4RLSource": "deflow.data.sources.d4rl.D4RLSource",
    "deflow.data.minari.MinariSource": "deflow.data.sources.minari.MinariSource",
    "deflow.data.own.OwnSource": "deflow.data.sources.custom.CustomSource",
}

RLPD = "deflow.agents.rlpd.RLPD"
WITHOUT_DISCOUNT = ("deflow.modules.critic.Critic", "deflow.modules.flow_critic.FlowCritic")  # batches have it

OF_HYDRA = {"_target_", "_partial_", "_convert_", "_recursive_"}  # the keys that are no arguments of the target
OF_THE_STAGES = {"one_launch"}  # read by `run_stages` and not by the Trainer
OF_THE_BUILDER = {"horizon"}  # read by `build_agent` and not by the agent
DEEPEST = 40  # levels; a file may hold a structure that contains itself


def load_config(path: Path) -> DictConfig:
    """The configuration in a run's folder, checked as `checked` does.

    Raises:
        UserError: if the file is damaged, or names what it may not.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {path}: it is damaged, or no run's configuration") from error
    return OmegaConf.create(checked(modernised(content), path))


def modernised(config: Any, depth: int = 0) -> Any:
    """A configuration as this version would have written it: components by their present names and arguments."""
    if depth > DEEPEST:  # which `checked` refuses
        return config
    if isinstance(config, list):
        return [modernised(value, depth + 1) for value in config]
    if not isinstance(config, dict):
        return config
    config = {name: modernised(value, depth + 1) for name, value in config.items()}
    if "_target_" in config:
        config["_target_"] = MOVED.get(str(config["_target_"]), config["_target_"])
    if config.get("_target_") in WITHOUT_DISCOUNT:
        config.pop("discount", None)
    if config.get("_target_") == RLPD and isinstance(config.get("critic"), dict) and "rho" not in config["critic"]:
        config["critic"]["aggregate"] = "min"  # which it always took, whatever the critic said
    return config


def checked(config: Any, file: str | Path) -> dict[str, Any]:
    """`config`, if it holds plain values and nothing but this package's components can be built from it.

    A target must be a class that this package defines, of a kind that configurations name; a logger of ours;
    Lightning's Trainer; an optimizer of `OPTIMIZERS`; or of a package that the command line trusts. All but the last
    get arguments that they know. Nothing is interpolated.

    Args:
        config: from a file.
        file: for the messages.

    Raises:
        UserError: naming the file, the key and what stands there.
    """
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no run's configuration")
    _check(config, "", file)
    for key in (*ROLES, "logger"):
        _check_role(config, key, file)
    return config


def _check(value: Any, key: str, file: str | Path, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise UserError(f"{file}: {key[:80]}... is deeper than any configuration")
    if isinstance(value, dict):
        _check_names(value, key, file)
        if "_target_" in value:
            _check_target(value, key, file)
        for name, inner in value.items():
            _check(inner, f"{key}.{name}".removeprefix("."), file, depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check(inner, f"{key}[{number}]", file, depth + 1)
    elif isinstance(value, str):
        if "${" in value:
            raise UserError(f"{file}: {key} holds an interpolation, {value}, which a file may not")
    elif type(value) not in (bool, int, float, type(None)):
        raise UserError(f"{file}: {key} holds a {type(value).__name__}, which no configuration does")


def _check_names(node: dict[Any, Any], key: str, file: str | Path) -> None:
    """Check a dictionary's keys: strings, and of those that mean something to Hydra only the harmless."""
    for name in node:
        if not isinstance(name, str) or "${" in name:
            raise UserError(f"{file}: {key} holds the name {name!r}, which no configuration does")
        if name.startswith("_") and (name not in OF_HYDRA or "_target_" not in node):
            raise UserError(f"{file}: {key} holds '{name}', which a file may not")


def _check_target(node: dict[str, Any], key: str, file: str | Path) -> None:
    target = node["_target_"]
    where = f"{file}: {key or 'the whole'}"
    if isinstance(target, str) and is_trusted(target):
        return
    found = _component(target)
    if found is None:
        raise UserError(f"{where} names {target}, which a file may not: {HINT}")
    known = set(inspect.signature(found).parameters) | OF_HYDRA
    if isinstance(found, type) and issubclass(found, Agent):
        known |= OF_THE_BUILDER
    if target == "lightning.Trainer":
        known |= OF_THE_STAGES
    unknown = sorted(set(node) - known)
    if unknown:
        raise UserError(f"{where} gives {target} the unknown argument '{unknown[0]}'")
    if isinstance(found, type) and issubclass(found, Source) and isinstance(node.get("env"), str):
        check_environment_id(node["env"], f"{where}.env")


def _component(target: Any) -> Any:
    """What `target` names, if a file may name it; None otherwise."""
    if target in FUNCTIONS:
        return get_object(target)
    module, _, name = str(target).rpartition(".")
    if not _is_module(module):
        return None
    found = vars(import_module(module)).get(name)
    # Defined there: what a module has imported is not its own.
    own = isinstance(found, type) and found.__module__ == module and issubclass(found, KINDS)
    return found if own else None


def _is_module(dotted: str) -> bool:
    """Whether there is a file of this package for it; nothing else is ever imported because a file names it."""
    package, *parts = dotted.split(".")
    if package != PACKAGE.name or not parts or not all(part.isidentifier() for part in parts):
        return False
    return PACKAGE.joinpath(*parts).with_suffix(".py").is_file()


def _check_role(config: dict[str, Any], key: str, file: str | Path) -> None:
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    target = node.get("_target_") if isinstance(node, dict) else None
    if target is None:
        raise UserError(f"{file}: {key} is missing: it is damaged, or no run's configuration")
    if is_trusted(str(target)):
        return
    found = _component(target)
    fits = target in LOGGERS if key == "logger" else isinstance(found, type) and issubclass(found, ROLES[key])
    if not fits:
        raise UserError(f"{file}: {key} names {target}, which is of another kind")
