"""`inspect_data.py`: the card of a data set, its action variance, and a policy's beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from deflow.checkpoints import agent_of, load_checkpoint, units_of
from deflow.config import plain
from deflow.data.measures import card
from deflow.data.measures.iav import ActionVariance, intrinsic_action_variance
from deflow.data.sources.columns import Arrays
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.evaluation.diversity import policy_samples
from deflow.policy import Policy
from deflow.report import write_json
from deflow.trust import trust_only
from deflow.units import AS_THEY_ARE, Units, scale_and_shift


def inspect(config: DictConfig) -> dict[str, Any]:
    """Print the card and write `NAME.json` and `NAME.png` into `config.out`.

    Raises:
        UserError: if the data or the checkpoint cannot be read, or the data are images.
    """
    trust_only(config.trust)
    checkpoint = None if config.ckpt is None else load_checkpoint(config.ckpt)
    policy = None if checkpoint is None else Policy(agent_of(checkpoint), units=units_of(checkpoint))  # before any work
    source: Source = instantiate(config.data.source)
    source.prepare()
    arrays, _ = source.arrays()
    rewards = source.label(arrays["rewards"])
    scaled = scale_and_shift(config.data.reward_scale, config.data.reward_shift, rewards[arrays["valids"] > 0])
    arrays["rewards"] = AS_THEY_ARE.with_rewards(*scaled).learned(rewards)
    if arrays["observations"].ndim > 2:
        raise UserError(f"{source.name} holds images, which are not inspected: look at the same data with states")
    units = _units(source, arrays)
    described = card.describe(arrays, units)
    described["task_ends_by_task"] = {name: _task_ends(other.arrays()[0]) for name, other in source.tasks().items()}
    title = f"{source.name} ({source.provenance()['path']})"
    card.print_card(title, described)

    rule = plain(config.iav)
    valid = (arrays["valids"] > 0) & np.isfinite(arrays["observations"]).all(1) & np.isfinite(arrays["actions"]).all(1)
    keys = ("neighbours", "sample", "include_self", "standardise", "seed")
    actions = np.clip(units.decided(arrays["actions"][valid]), -1, 1)  # as delta is measured
    variances = {
        "data": intrinsic_action_variance(arrays["observations"][valid], actions, **{key: rule[key] for key in keys})
    }
    if policy is not None:
        variances |= _policy_variances(policy, units, config, arrays["observations"][valid])
    _print_variances(variances, rule)

    out = Path(config.out).expanduser()
    name = source.name.replace("/", "_")
    card.draw(arrays, title, out / f"{name}.png")
    result = {"name": source.name, "task": source.task, "data": source.provenance(), "card": described}
    result["action_variance"] = {name: asdict(variance) for name, variance in variances.items()}
    write_json(out / f"{name}.json", result)
    Console().print(f"{out / name}.json, {out / name}.png", soft_wrap=True)
    return result


def _units(source: Source, arrays: Arrays) -> Units:
    """The units that a training would take, of the rows that it would not refuse."""
    finite = np.isfinite(arrays["observations"]).all(1) & np.isfinite(arrays["actions"]).all(1)
    finite &= np.isfinite(arrays["rewards"])
    try:
        whole = source.transitions({name: column[finite] for name, column in arrays.items()}, source.name)
    except UserError:  # no transition is left
        return AS_THEY_ARE
    return source.with_units(whole).units


def _task_ends(arrays: Arrays) -> int:
    return int(((arrays["masks"] == 0) & (arrays["valids"] > 0)).sum())


def _policy_variances(
    policy: Policy, units: Units, config: DictConfig, observations: np.ndarray
) -> dict[str, ActionVariance]:
    """The variance of the policy's actions and of its proposals, in the data's units."""
    states = torch.from_numpy(policy.units.observed(observations)).float()
    picks = torch.randperm(len(states), generator=torch.Generator().manual_seed(config.seed))
    drawn = policy_samples(policy, states[picks[: config.iav.sample]], config.samples, config.seed)
    decided = {name: units.decided(policy.units.executed(actions)) for name, actions in drawn.items()}
    return {name: ActionVariance.of_states(a.var(axis=1, ddof=1), config.seed) for name, a in decided.items()}


def _print_variances(variances: dict[str, ActionVariance], rule: dict[str, Any]) -> None:
    itself = "with" if rule["include_self"] else "without"
    distance = "standardised" if rule["standardise"] else "raw"
    neighbourhood = f"{rule['neighbours']} neighbours {itself} itself, {distance} observations"
    table = Table(title=f"variance of actions in [-1, 1] at a state (data: {neighbourhood})")
    for column in ("", "variance", "95% interval", "std", "states", "by dimension"):
        table.add_column(column)
    for name, variance in variances.items():
        interval = " to ".join(f"{end:.4f}" for end in variance.interval)
        by_dimension = " ".join(f"{value:.3f}" for value in variance.per_dimension)
        row = (f"{variance.mean:.4f}", interval, f"{variance.std:.3f}", str(variance.states), by_dimension)
        table.add_row(name, *row)
    Console().print(table)
