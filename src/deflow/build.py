"""From settings to an agent, and the settings that only the data can decide."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from deflow.agents.base import Agent
from deflow.config import plain
from deflow.data.measures.iav import intrinsic_action_variance
from deflow.data.memory.transitions import Transitions
from deflow.data.scales import deviations, negligible
from deflow.errors import UserError
from deflow.modules.statistics import PathStatistics, StateStatistics, StepStatistics
from deflow.sections import AUTO, STAND_IN
from deflow.settings import check_component
from deflow.types import Spec

log = logging.getLogger(__name__)

# Transitions of which statistics are taken, evenly spaced: more would not change what standardises.
MOST_MEASURED = 200_000

# Settings that are the data's at first and then belong to the weights.
UNITS_OF_WEIGHTS = ("path", "critic.value_range", "critic.statistics", "dynamics.statistics")


def build_agent(settings: DictConfig | dict[str, Any], spec: Spec) -> Agent:
    """The agent that `settings` describe, freshly initialised.

    Args:
        settings: the configuration's `agent`; `horizon` is how many actions the policy decides at once.
        spec: sizes of the task.

    Raises:
        UserError: for a setting that the agent does not know, or a value that it may not have.
    """
    check_component(settings, "agent")
    config = OmegaConf.create(plain(settings) if isinstance(settings, DictConfig) else settings)
    for key in _undecided(config):
        OmegaConf.update(config, key, STAND_IN[key])
    horizon = config.pop("horizon", 1)
    return instantiate(config, _partial_=True)(spec=spec.chunked(horizon))


def decide(config: DictConfig, transitions: Transitions) -> bool:
    """Put what the data say in the place of every `auto` under `config.agent`; whether there was one."""
    undecided = _undecided(config.agent)
    if "trust_region" in undecided:
        _decide_trust_region(config, transitions)
    if "path" in undecided:
        config.agent.path = path_statistics(transitions, config.agent.get("horizon", 1))
    if "critic.value_range" in undecided:
        _decide_value_range(config, transitions)
    if "critic.statistics" in undecided:
        config.agent.critic.statistics = state_statistics(transitions)
    if "dynamics.statistics" in undecided:
        config.agent.dynamics.statistics = step_statistics(transitions)
    return bool(undecided)


def take_units(agent: DictConfig, taught: Mapping[str, Any], spec: Spec) -> None:
    """Put what a checkpoint's weights were trained with in the place of `auto`: in other units they say other things.

    Of a checkpoint of other sizes nothing is taken: its weights do not fit, which is said when they are loaded.

    Args:
        agent: the configuration's `agent`, to be changed.
        taught: what the checkpoint with whose weights it begins says of itself.
        spec: sizes of the task.

    Raises:
        UserError: if it is given, and something else.
    """
    if Spec.of_list(taught["spec"]) != spec.chunked(agent.get("horizon", 1)):
        return
    before = OmegaConf.create(taught["config"]["agent"])
    for key in UNITS_OF_WEIGHTS:
        theirs, ours = (OmegaConf.select(settings, key) for settings in (before, agent))
        if theirs is None or ours is None:
            continue
        if ours == AUTO:
            OmegaConf.update(agent, key, theirs)
        elif not _are_close(ours, theirs):
            raise UserError(f"agent.{key} is not that of ckpt, whose weights mean nothing with another: leave it out")


def _are_close(ours: Any, theirs: Any) -> bool:
    """Whether settings are the same but for the rounding of their numbers."""
    if isinstance(ours, DictConfig) and isinstance(theirs, DictConfig):
        return ours.keys() == theirs.keys() and all(_are_close(ours[key], theirs[key]) for key in ours)
    return np.shape(ours) == np.shape(theirs) and bool(np.allclose(ours, theirs, rtol=1e-6, atol=0))


def _undecided(agent: DictConfig) -> list[str]:
    return [key for key in STAND_IN if OmegaConf.select(agent, key) == AUTO]


def _decide_trust_region(config: DictConfig, transitions: Transitions) -> None:
    """Set `config.agent.trust_region`, and why in `config.iav.result`."""
    if transitions.states.ndim > 2:
        raise UserError("agent.trust_region=auto needs states, whose distances mean something: give a number")
    rule = plain(config.iav)
    factor, per_dimension = rule.pop("factor"), rule.pop("per_dimension")
    rule.pop("result")
    rows = transitions.starts
    variance = intrinsic_action_variance(transitions.states[rows].numpy(), transitions.decisions(rows).numpy(), **rule)
    horizon = config.agent.get("horizon", 1)  # every action of a chunk has the same limits
    measured = list(variance.per_dimension) * horizon if per_dimension else variance.mean
    delta = [factor * value for value in measured] if isinstance(measured, list) else factor * measured
    config.agent.trust_region = delta
    config.iav.result = {"delta": delta} | asdict(variance)
    shown = ", ".join(f"{value:.2g}" for value in (delta if isinstance(delta, list) else [delta]))
    log.info("trust region: delta = %s, %g times the data's action variance %.3g", shown, factor, variance.mean)


def _decide_value_range(config: DictConfig, transitions: Transitions) -> None:
    """Set `config.agent.critic.value_range`: 0, and the extreme rewards, received for ever or, if they end it, once."""
    rewards, goes_on = transitions.learned_rewards(transitions.starts), transitions.masks[transitions.starts] > 0
    found = [0.0]
    for some, times in ((rewards[goes_on], 1 / (1 - config.data.discount)), (rewards[~goes_on], 1.0)):
        found += [times * end.item() for end in some.aminmax()] if len(some) else []
    low, high = min(found), max(found)
    config.agent.critic.value_range = [low, high]
    log.info("value range of the flow critic: %.4g to %.4g", low, high)


def state_statistics(transitions: Transitions) -> StateStatistics:
    """What standardises a model of states, in the units that the agent learns from."""
    observations = transitions.observations(_measured(transitions.starts)).double()
    low, high = (end.item() for end in transitions.learned_rewards(transitions.starts).aminmax())
    return {
        "observation_mean": observations.mean(0).tolist(),
        "observation_std": _deviation(observations).tolist(),
        "reward_centre": (low + high) / 2,
        "reward_scale": (high - low) / 2 if high > low else 1.0,
    }


def step_statistics(transitions: Transitions) -> StepStatistics:
    """What standardises a model of the environment's steps, in the units that the agent learns from."""
    rows = _measured(transitions.starts)
    here = transitions.observations(rows).double()
    changes = transitions.observations(rows + 1).double() - here
    return {
        **state_statistics(transitions),
        "change_mean": changes.mean(0).tolist(),
        "change_std": _size_of(changes, here).tolist(),
    }


def path_statistics(transitions: Transitions, horizon: int) -> PathStatistics:
    """What standardises the states after each of so many steps, in the units that the agent learns from."""
    rows = _measured(transitions.chunk_starts(horizon))
    here = transitions.observations(rows).double()
    changes = [transitions.observations(rows + step).double() - here for step in range(1, horizon + 1)]
    return {
        "mean": [number for change in changes for number in change.mean(0).tolist()],
        "std": [number for change in changes for number in _size_of(change, here).tolist()],
    }


def _measured(starts: Tensor) -> Tensor:
    """Rows of which statistics are taken."""
    return starts[:: -(-len(starts) // MOST_MEASURED)]


def _deviation(values: Tensor) -> Tensor:
    """Standard deviations along the first axis; 1 for what does not vary."""
    found = torch.from_numpy(deviations(values.numpy()))
    return torch.where(found > 0, found, 1.0)


def _size_of(changes: Tensor, states: Tensor) -> Tensor:
    """Standard deviations of changes of states; of one that is always the same its size, of none that of the state."""
    deviation, size = changes.std(0, correction=0), changes.mean(0).abs()
    least = torch.from_numpy(negligible(states.abs().amax(0).numpy(), deviation.numpy()))
    return torch.where(deviation > least, deviation, torch.where(size > least, size, _deviation(states)))
