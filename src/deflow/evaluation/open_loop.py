"""How good a model of the environment's steps is: open-loop errors, calibration, spread off the data, and a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from deflow.data.memory.transitions import Transitions
from deflow.files import replacing
from deflow.modules.transition_flow import Outcome, TransitionModel
from deflow.seeding import torch_generator

log = logging.getLogger(__name__)

LENGTHS = (1, 5, 25, 50)  # steps without looking at the data again
STARTS, DRAWS = 128, 8  # trajectories followed, and how often each
STEPS, SAMPLES = 256, 64  # single steps at which the spread is measured, and outcomes drawn of each
CENTRAL = (0.5, 0.9)  # shares of the samples, around their median
MOVES = (0.0, 0.1, 0.3, 1.0)  # root mean square over the dimensions by which actions are moved
ALMOST_0 = 1e-9
UNCHANGED = "nothing changes"

Sampler = Callable[[Tensor, Tensor, Tensor], Outcome]


@torch.no_grad()
def measure_transitions(
    model: TransitionModel, training: Transitions, held_out: Transitions | None, seed: int
) -> dict[str, Any]:
    """Errors of a model on trajectories that it was not trained on, or only its spread if there are none.

    Errors are root mean squares over trajectories and dimensions, in units of each dimension's standard deviation in
    the training data.

    Args:
        model: where its weights are.
        training: data of which it learned.
        held_out: other trajectories; None: there are none.
        seed: of the choice of trajectories and of the noise.

    Returns:
        `trajectories` that are long enough and those `left_out` because they are shorter; for each way to draw from
        the model `error`, by the number of steps, of a drawn trajectory and, as `mean`, of the mean of several;
        `error` also of nothing changing; `reward_error` of one step, in units of reward; `coverage`, the share of true
        next states inside the central 50% and 90% of the samples; `spread` of the samples, by how far actions are moved
        in random directions.
    """
    generator = torch_generator(model.device, seed, "transitions")
    found: dict[str, Any] = {}
    if held_out is None:
        log.warning("no validation data: the errors of the transition model are not measured, only its spread")
    else:
        found = _open_loop(model, held_out, generator) | _single_steps(model, held_out, generator)
    return found | {"spread": _spread(model, training if held_out is None else held_out, generator)}


@torch.no_grad()
def steps_within(model: TransitionModel, held_out: Transitions, most: int, seed: int) -> tuple[int, list[float]]:
    """How many imagined steps stay within what `model.within` allows, and the errors after each.

    Args:
        model: with such a limit.
        held_out: trajectories that it was not trained on.
        most: steps that are asked for.
        seed: of the choice of trajectories and of the noise.

    Returns:
        The most steps of which none has an error above the limit, from 0 to `most`, and the errors of 1, 2, ... steps
        as shares of those of a model in which nothing changes, as far as the longest trajectory reaches.
    """
    assert model.within is not None
    ends = held_out.last_rows[held_out.starts]
    most = min(most, int((ends - held_out.starts).max()))
    generator = torch_generator(model.device, seed, "imagined steps")
    rows = _choose(held_out.starts[ends - held_out.starts >= most], STARTS, generator)
    first = states = _states(model, held_out, rows)
    errors = []
    for step in range(most):
        actions = held_out.decisions(rows + step).to(model.device)
        states = model.imagine(states, actions, _noise(model, len(states), generator)).observations
        truth = _states(model, held_out, rows + step + 1)
        errors.append(_error(model, states - truth) / max(_error(model, first - truth), ALMOST_0))
    allowed = next((step for step, error in enumerate(errors) if not error <= model.within), most)
    return allowed, errors


def _open_loop(model: TransitionModel, held_out: Transitions, generator: torch.Generator) -> dict[str, Any]:
    ends = held_out.last_rows[held_out.starts]
    trajectory_lengths = (ends - held_out.first_rows[held_out.starts])[held_out.starts + 1 == ends]
    lengths = [length for length in LENGTHS if length <= int(trajectory_lengths.max())]
    longest = lengths[-1]
    left_out = int((trajectory_lengths < longest).sum())
    if left_out or longest < LENGTHS[-1]:
        log.warning(
            "open-loop errors over up to %d steps: %d of %d validation trajectories are shorter and left out",
            longest,
            left_out,
            len(trajectory_lengths),
        )
    rows = _choose(held_out.starts[ends - held_out.starts >= longest], STARTS, generator)
    errors = {UNCHANGED: _unchanged_errors(model, held_out, rows, lengths)}
    for name, sampler in model.samplers().items():
        errors |= _followed_errors(model, sampler, name, held_out, rows, lengths, generator)
    return {"trajectories": len(trajectory_lengths) - left_out, "left_out": left_out, "error": errors}


def _unchanged_errors(
    model: TransitionModel, held_out: Transitions, rows: Tensor, lengths: list[int]
) -> dict[str, float]:
    here = held_out.observations(rows).to(model.device)
    return {str(n): _error(model, here - _states(model, held_out, rows + n)) for n in lengths}


def _followed_errors(
    model: TransitionModel,
    sampler: Sampler,
    name: str,
    held_out: Transitions,
    rows: Tensor,
    lengths: list[int],
    generator: torch.Generator,
) -> dict[str, dict[str, float]]:
    """Of trajectories that follow the data's actions from the data's states, several of each."""
    states = _states(model, held_out, rows).repeat_interleave(DRAWS, 0)
    drawn, mean = {}, {}
    for step in range(lengths[-1]):
        actions = held_out.decisions(rows + step).to(model.device).repeat_interleave(DRAWS, 0)
        states = sampler(states, actions, _noise(model, len(states), generator)).observations
        if (n := step + 1) in lengths:
            errors = states.unflatten(0, (-1, DRAWS)) - _states(model, held_out, rows + n)[:, None]
            drawn[str(n)], mean[str(n)] = _error(model, errors), _error(model, errors.mean(1))
    return {name: drawn, f"{name}, mean": mean}


def _single_steps(model: TransitionModel, held_out: Transitions, generator: torch.Generator) -> dict[str, Any]:
    rows = _choose(held_out.starts, STEPS, generator)
    truth, rewards = _states(model, held_out, rows + 1), held_out.learned_rewards(rows).to(model.device)
    states, actions = _states(model, held_out, rows), held_out.decisions(rows).to(model.device)
    varies = (_states(model, held_out, rows + 1) - states).std(0) > 0  # a constant has no spread to be checked
    coverage, reward_error = {}, {}
    for name, sampler in model.samplers().items():
        outcome = _several(model, sampler, states, actions, generator)
        next_states = outcome.observations.unflatten(0, (-1, SAMPLES))
        coverage[name] = {
            f"{share:.0%}": _inside(next_states, truth, share)[:, varies].float().mean().item() for share in CENTRAL
        }
        errors = outcome.rewards.unflatten(0, (-1, SAMPLES)) - rewards[:, None]
        reward_error[name] = errors.square().mean().sqrt().item()
    return {"coverage": coverage, "reward_error": reward_error}


def _inside(samples: Tensor, truth: Tensor, share: float) -> Tensor:
    """Whether each number is inside the central `share` of its samples, bool of shape (steps, observation_dim).

    Args:
        samples: shape (steps, samples, observation_dim).
        truth: shape (steps, observation_dim).
        share: in (0, 1).
    """
    low, high = (samples.quantile(end, dim=1) for end in ((1 - share) / 2, (1 + share) / 2))
    return (low <= truth) & (truth <= high)


def _spread(model: TransitionModel, data: Transitions, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Standard deviation of the next states drawn, for the data's actions and for some that were moved away."""
    rows = _choose(data.starts, STEPS, generator)
    states, actions = _states(model, data, rows), data.decisions(rows).to(model.device)
    directions = torch.randn(actions.shape, generator=generator, device=model.device)
    directions /= directions.square().mean(-1, keepdim=True).sqrt()
    found: dict[str, dict[str, float]] = {}
    for name, sampler in model.samplers().items():
        found[name] = {}
        for move in MOVES:
            moved = (actions + move * directions).clamp(-1.0, 1.0)
            drawn = _several(model, sampler, states, moved, generator).observations.unflatten(0, (-1, SAMPLES))
            found[name][f"{move:g}"] = _error(model, drawn - drawn.mean(1, keepdim=True))
    return found


def _several(
    model: TransitionModel, sampler: Sampler, states: Tensor, actions: Tensor, generator: torch.Generator
) -> Outcome:
    """Outcomes of each step, in consecutive rows."""
    states, actions = (column.repeat_interleave(SAMPLES, 0) for column in (states, actions))
    return sampler(states, actions, _noise(model, len(states), generator))


def _noise(model: TransitionModel, rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, model.outcome_dim, generator=generator, device=model.device)


def _choose(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Some of the rows, all different; all of them if there are not so many."""
    return rows[torch.randperm(len(rows), generator=generator, device=generator.device)[:count].to(rows.device)]


def _states(model: TransitionModel, data: Transitions, rows: Tensor) -> Tensor:
    return data.observations(rows).to(model.device)


def _error(model: TransitionModel, differences: Tensor) -> float:
    """Root mean square of differences between observations, in units of their standard deviations."""
    return (differences / model.observation_std).square().mean().sqrt().item()


def draw_transitions(found: dict[str, Any], path: Path) -> None:
    """A picture of what `measure_transitions` found; panels of what was not measured are left out.

    Args:
        found: by `measure_transitions`.
        path: of the PNG.
    """
    panels = [(_draw_errors, "error"), (_draw_coverage, "coverage"), (_draw_spread, "spread")]
    panels = [(draw, key) for draw, key in panels if key in found]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (draw, key) in zip(np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels, strict=True):
        draw(axis, found[key])
        axis.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, dpi=80)


def _draw_errors(axis: Axes, errors: dict[str, dict[str, float]]) -> None:
    for name, by_steps in errors.items():
        style: dict[str, Any] = {"color": "tab:gray", "linestyle": ":"} if name == UNCHANGED else {}
        axis.plot([int(steps) for steps in by_steps], list(by_steps.values()), marker="o", label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="standard deviations of the state")
    axis.margins(y=0.4)  # room for the names
    axis.set_title("error without looking at the data again")


def _draw_coverage(axis: Axes, coverage: dict[str, dict[str, float]]) -> None:
    axis.plot([0, 1], [0, 1], color="tab:gray", linestyle=":", label="calibrated")
    for name, by_share in coverage.items():
        axis.plot(CENTRAL, list(by_share.values()), marker="o", label=name)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="central share of the samples", ylabel="share of true next states inside")
    axis.set_title("calibration of one step")


def _draw_spread(axis: Axes, spread: dict[str, dict[str, float]]) -> None:
    for name, by_move in spread.items():
        axis.plot([float(move) for move in by_move], list(by_move.values()), marker="o", label=name)
    axis.set(xlabel="actions moved by", ylabel="standard deviations of the state", ylim=(0, None))
    axis.set_title("spread of one step, off the data")
