"""Reading checkpoints: plain contents, the agent in them, its weights for another run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deflow.agents.base import Agent
from deflow.build import build_agent
from deflow.errors import UserError
from deflow.exported import SUFFIX as EXPORTED_SUFFIX
from deflow.run_folder import CHECKPOINTS, FINAL, LAST
from deflow.sharing.address import is_address
from deflow.sharing.fetching import at_hand
from deflow.stored import checked, modernised
from deflow.types import Spec
from deflow.units import Units

FORMAT = 2  # of what this version writes; checkpoints that name none are of the first

WEIGHTS = ".safetensors"  # suffix of an exported checkpoint: its weights, and as metadata its entry `deflow` in JSON
ENTRY_OF_WEIGHTS = "deflow"

# What every checkpoint holds, and of what type; see `Run.described`.
CONTENT: dict[str, type] = {
    "state_dict": dict,
    "deflow": dict,
    "deflow.task": str,
    "deflow.spec": list,
    "deflow.config": dict,
    "deflow.config.seed": int,
    "deflow.config.eval": dict,
}
# What one that training goes on from holds besides.
TO_RESUME: dict[str, type] = {
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
ALLOWED_STEPS = "allowed_steps"  # in its `deflow`, if the stage limits the steps that its agent takes in its model
# And one of a stage that is done.
OF_A_STAGE: dict[str, type] = {"optimizer_states": list, "deflow.updates_per_second": float}


def load_checkpoint(
    path: str | Path, more: dict[str, type] | None = None, tracking_uri: str | None = None
) -> dict[str, Any]:
    """A checkpoint's plain contents; its configuration names nothing that a file may not, see `stored.checked`.

    Args:
        path: of the file, a `.ckpt` of a run or a `.safetensors` that was exported of one; or a run's folder, see
            `newest_checkpoint`; or where a policy is shared.
        more: entries that are needed besides those of every checkpoint, such as `TO_RESUME`.
        tracking_uri: of MLflow, where a shared policy is looked for; see `registry.store_of`.

    Raises:
        UserError: if it is missing, not one of ours, or not a whole one.
    """
    path = checkpoint_at(path)
    with at_hand(path, tracking_uri) as file:
        if not file.is_file():
            raise UserError(f"no checkpoint {path}")
        if file.suffix == EXPORTED_SUFFIX:
            raise UserError(
                f"{path} is an exported policy, which deflow.load and serve.py read: give the checkpoint behind it"
            )
        try:
            checkpoint = _weights(file) if file.suffix == WEIGHTS else _pickled(file)
        except Exception as error:  # torch raises half a dozen kinds for a file that is not a checkpoint
            raise UserError(f"cannot read {path}: it is not a whole checkpoint") from error
    if not isinstance(checkpoint, dict) or "deflow" not in checkpoint:
        raise UserError(f"{path} is a checkpoint of something else: it lacks the entry 'deflow'")
    for key, kind in (CONTENT | (more or {})).items():
        if not isinstance(_entry(checkpoint, key), kind):
            raise UserError(f"{path} is not a whole checkpoint: its entry '{key}' is missing or of another kind")
    about = checkpoint["deflow"]
    _check_format(about, path, to_go_on=more is not None)
    sound = {
        "state_dict": all(isinstance(weight, Tensor) for weight in checkpoint["state_dict"].values()),
        "optimizer_states": all(_is_optimizer_state(state) for state in checkpoint.get("optimizer_states", ())),
        "deflow.spec": _is_made(lambda: Spec.of_list(about["spec"])),
        "deflow.units": _is_made(lambda: units_of(checkpoint)),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            raise UserError(f"{path} is not a whole checkpoint: its entry '{key}' holds something else")
    about["config"] = checked(modernised(about["config"]), path)
    return checkpoint


def checkpoint_at(place: str | Path, run_seed: int | None = None) -> str | Path:
    """Where a policy is shared, as it is; else as `newest_checkpoint`."""
    if not is_address(place):
        return newest_checkpoint(Path(place).expanduser(), run_seed)
    if run_seed is not None:
        raise UserError(f"run_seed chooses among the seeds in a run's folder, and {place} is the policy of one")
    return place


def newest_checkpoint(path: Path, run_seed: int | None = None) -> Path:
    """The checkpoint at `path`, or the newest in the run's folder at `path`.

    Args:
        path: of a file or a folder.
        run_seed: which of a run's seeds, if it trained several.

    Raises:
        UserError: if there is none, or the seed remains open.
    """
    if path.is_dir():
        return _of_seed(newest_in_run(path), run_seed)
    if run_seed is not None:
        raise UserError(f"run_seed chooses among the seeds in a run's folder, and {path} is none")
    return path


def newest_in_run(folder: Path) -> Path:
    """What the newest stage that has a checkpoint has left, finished or not; of all seeds if there are several.

    Raises:
        UserError: if there is none.
    """
    for stage in sorted((folder / CHECKPOINTS).glob("*_*"), key=_number, reverse=True):
        for file in (stage / FINAL, stage / LAST):
            if file.is_file():
                return file
    raise UserError(f"{folder} is no run's folder: there is no stage with a checkpoint in {folder / CHECKPOINTS}")


def _number(stage: Path) -> int:
    number = stage.name.partition("_")[0]
    return int(number) if number.isdigit() else -1


def _of_seed(checkpoint: Path, run_seed: int | None) -> Path:
    """The only seed's checkpoint; or one of several seeds', which lie beside that of all."""
    several = sorted(path.name for path in checkpoint.parent.glob("seed_*.ckpt"))
    if run_seed is None and several:
        raise UserError(f"{checkpoint.parent} holds several seeds: give run_seed, or the path of {', '.join(several)}")
    if run_seed is None:
        return checkpoint
    if f"seed_{run_seed}.ckpt" not in several:
        found = ", ".join(several) or "none, as in a run of one seed or before the end of a stage"
        raise UserError(f"{checkpoint.parent} has no seed_{run_seed}.ckpt; seeds found: {found}")
    return checkpoint.with_name(f"seed_{run_seed}.ckpt")


def agent_of(checkpoint: dict[str, Any], **settings: Any) -> Agent:
    """The agent of a loaded checkpoint with its weights; `settings` replace those it was trained with.

    Raises:
        UserError: if the checkpoint holds several seeds, or weights of other networks than it says.
    """
    about = checkpoint["deflow"]
    _refuse_several(about)
    trained = about["config"]["agent"]
    for name in sorted(settings.keys() - trained.keys()):
        raise UserError(f"{name}: {trained['_target_'].rpartition('.')[2]}, of which the checkpoint is, has none")
    try:
        agent = build_agent(trained | settings, Spec.of_list(about["spec"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's settings do not make an agent: {error}") from error
    check_weights(agent, checkpoint, "the checkpoint")
    agent.load_state_dict(checkpoint["state_dict"])
    return agent


def units_of(checkpoint: dict[str, Any]) -> Units:
    """The units in which a loaded checkpoint's agent was trained."""
    about = checkpoint["deflow"]
    return Units.of(about.get("units"), Spec.of_list(about["spec"]))


def load_to_begin_with(path: str | Path, task: str | None, units: Units) -> dict[str, Any]:
    """A checkpoint with whose weights an agent may begin.

    Args:
        path: of the checkpoint.
        task: of which it must be; None: of any.
        units: of the data that the agent will train on.

    Raises:
        UserError: if it is of another task or other units, or holds several seeds.
    """
    checkpoint = load_checkpoint(path)
    _refuse_several(checkpoint["deflow"])
    of = checkpoint["deflow"]["task"]
    if task is not None and of != task:
        raise UserError(f"{path} is a checkpoint of {of}, not of {task}; ckpt_of_any_task=true takes it all the same")
    if not units_of(checkpoint).is_close(units):
        raise UserError(
            f"{path} was trained on other units of actions, observations or rewards than these data have: give it the "
            "same, see data.source.action_range=[LOW,HIGH], data.source.standardise, data.reward_scale and "
            "data.reward_shift"
        )
    return checkpoint


def begin_with(agent: Agent, checkpoint: dict[str, Any], name: str | Path) -> None:
    """Let an agent begin with the weights of a loaded checkpoint.

    Raises:
        UserError: naming `name`, if its networks have other shapes.
    """
    try:
        agent.start_from(checkpoint)
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()[1:]), str(error)).strip()  # of many, below a heading
        key = re.search(r'key\(s\) in state_dict: "([^"]+)"', first)
        difference = f", as in '{key[1]}'" if key is not None else f": {first}"
        agent_there = str(checkpoint["deflow"]["config"]["agent"]["_target_"]).rpartition(".")[2]
        raise UserError(
            f"the networks of {name}, of {agent_there}, differ from the configured ones{difference}"
        ) from error


def check_weights(agent: Agent, checkpoint: dict[str, Any], name: str | Path) -> None:
    """Whether a loaded checkpoint's weights are those of networks like the agent's.

    Raises:
        UserError: naming `name` and one that is not.
    """
    ours, theirs = agent.state_dict(), checkpoint["state_dict"]
    others = [key for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape]
    wrong = sorted([*others, *(ours.keys() ^ theirs.keys())])
    if wrong:
        raise UserError(f"the networks of {name} differ from the configured ones, as in '{wrong[0]}'")


def _pickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _weights(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        about = {key: json.loads(text) for key, text in (file.metadata() or {}).items() if key == ENTRY_OF_WEIGHTS}
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}} | about  # noqa: SIM118


def _entry(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _is_made(make: Callable[[], Any]) -> bool:
    """Whether something can be made of what a file holds."""
    try:
        make()
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _is_optimizer_state(state: Any) -> bool:
    groups = _entry(state, "param_groups")
    named = isinstance(groups, list) and all(isinstance(_entry(group, "params"), list) for group in groups)
    return named and isinstance(_entry(state, "state"), dict) and all("name" in group for group in groups)


def _check_format(about: dict[str, Any], path: str | Path, to_go_on: bool) -> None:
    written = about.get("format", 1)
    if written not in (1, FORMAT):
        raise UserError(f"{path} was written by a newer version of deflow: update this one")
    if written < FORMAT and to_go_on:
        raise UserError(
            f"{path} was written by an older version of deflow, whose run cannot go on in this one: "
            "evaluate it, or start a new run from its weights by ckpt="
        )


def _refuse_several(about: dict[str, Any]) -> None:
    seeds = about["config"].get("seeds", 1)  # older ones hold one and do not say so
    if seeds != 1:
        first = about["config"]["seed"]
        beside = f"seed_{first}.ckpt, which are there once the stage is done"
        raise UserError(f"the checkpoint holds {seeds} seeds: take one of those beside it, as {beside}")
