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
TRAINING_PAIRS, AT_ONCE = 100_000, 10_000  # of which the nearest is looked for, and so many in one go
EXACT = "donot_use_mm_for_euclid_dist"  # products of matrices lose small distances
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
        `error` also of nothing changing; `ends`, by the number of steps, the share of trajectories that the model has
        ended while the task goes on (`false`) and of those that it has not where the task has ended (`missed`; None
        where there are no such steps), and `ends_of_one_step` from states of the data; `error_by_distance` of one step,
        four pairs `[distance, error]`, one for each quarter of the steps in the order of their distance from the
        training data; `reward_error` of one step, in units of reward; `coverage`, the share of true next states inside
        the central 50% and 90% of the samples (NaN if nothing varies); `spread` of the samples, by how far actions are
        moved in random directions.
    """
    generator = torch_generator(model.device, seed, "transitions")
    found: dict[str, Any] = {}
    if held_out is None:
        log.warning("no validation data: the errors of the transition model are not measured, only its spread")
    else:
        found = _open_loop(model, held_out, generator) | _single_steps(model, training, held_out, generator)
    return found | {"spread": _spread(model, training if held_out is None else held_out, generator)}


@torch.no_grad()
def steps_within(model: TransitionModel, held_out: Transitions, most: int, seed: int) -> tuple[int, list[float]]:
    """How many imagined steps stay within what `model.within` allows, and the errors after each.

    The error is the energy score of several drawn trajectories: their mean distance from the truth less half of that
    from each other, so that a model that spreads as the truth does is not punished for it. A trajectory that the model
    ends while the task goes on stays where it was.

    Args:
        model: with such a limit.
        held_out: trajectories that it was not trained on.
        most: steps that are asked for.
        seed: of the choice of trajectories and of the noise.

    Returns:
        The most steps of which none has an error above the limit, from 0 to `most`, and the errors of 1, 2, ... steps
        as shares of those of a model in which nothing changes, as far as the longest trajectory and its task go.
    """
    assert model.within is not None
    ends = held_out.last_rows[held_out.starts]
    most = min(most, int((ends - held_out.starts).max()))
    generator = torch_generator(model.device, seed, "imagined steps")
    rows = _choose(held_out.starts[ends - held_out.starts >= most], STARTS, generator)
    first = _states(model, held_out, rows)
    states = first.repeat_interleave(DRAWS, 0)
    goes_on, truly_goes_on = torch.ones_like(states[:, 0]), torch.ones_like(first[:, 0])
    errors: list[float] = []
    for step in range(most):
        actions = held_out.decisions(rows + step).to(model.device).repeat_interleave(DRAWS, 0)
        outcome = model.imagine(states, actions, _noise(model, len(states), generator))
        goes_on = goes_on * outcome.continues
        states = torch.where(goes_on[:, None] > 0, outcome.observations, states)
        truly_goes_on = truly_goes_on * _goes_on(model, held_out, rows + step)
        there = truly_goes_on > 0  # an end that is true leads nowhere
        if not there.any():
            break
        truth, drawn = _states(model, held_out, rows + step + 1)[there], states.unflatten(0, (-1, DRAWS))[there]
        of_nothing = _energy_score(model, first[there, None], truth)
        errors.append(_energy_score(model, drawn, truth) / max(of_nothing, ALMOST_0))
    allowed = next((step for step, error in enumerate(errors) if not error <= model.within), len(errors))
    return allowed, errors


def _energy_score(model: TransitionModel, drawn: Tensor, truth: Tensor) -> float:
    """Mean distance of draws from the truth less half of that between two of them, in standard deviations.

    Args:
        model: whose deviations count.
        drawn: shape (starts, draws, observation_dim).
        truth: shape (starts, observation_dim).
    """
    unit = model.observation_std * drawn.shape[-1] ** 0.5
    drawn, truth = drawn / unit, truth / unit
    draws = drawn.shape[1]
    apart = torch.cdist(drawn, drawn).sum((1, 2)) / max(draws * (draws - 1), 1)
    return ((drawn - truth[:, None]).norm(dim=-1).mean(1) - apart / 2).mean().item()


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
    errors, ends_found = {UNCHANGED: _unchanged_errors(model, held_out, rows, lengths)}, {}
    for name, sampler in model.samplers().items():
        errors[name], errors[f"{name}, mean"], ends_found[name] = _followed(
            model, sampler, held_out, rows, lengths, generator
        )
    counted = {"trajectories": len(trajectory_lengths) - left_out, "left_out": left_out}
    return counted | {"error": errors, "ends": ends_found}


def _unchanged_errors(
    model: TransitionModel, held_out: Transitions, rows: Tensor, lengths: list[int]
) -> dict[str, float]:
    here = held_out.observations(rows).to(model.device)
    return {str(n): _error(model, here - _states(model, held_out, rows + n)) for n in lengths}


def _followed(
    model: TransitionModel,
    sampler: Sampler,
    held_out: Transitions,
    rows: Tensor,
    lengths: list[int],
    generator: torch.Generator,
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float | None]]]:
    """Of trajectories that follow the data's actions from the data's states, several of each.

    Returns:
        By the number of steps: errors of a drawn trajectory, of the mean of several, and the `false` and `missed` ends.
    """
    states = _states(model, held_out, rows).repeat_interleave(DRAWS, 0)
    goes_on, truly_goes_on = torch.ones_like(states[:, 0]), torch.ones_like(states[::DRAWS, 0])
    drawn, mean = {}, {}
    ends: dict[str, dict[str, float | None]] = {"false": {}, "missed": {}}
    for step in range(lengths[-1]):
        actions = held_out.decisions(rows + step).to(model.device).repeat_interleave(DRAWS, 0)
        outcome = sampler(states, actions, _noise(model, len(states), generator))
        states, goes_on = outcome.observations, goes_on * outcome.continues
        truly_goes_on = truly_goes_on * _goes_on(model, held_out, rows + step)
        if (n := step + 1) in lengths:
            errors = states.unflatten(0, (-1, DRAWS)) - _states(model, held_out, rows + n)[:, None]
            drawn[str(n)], mean[str(n)] = _error(model, errors), _error(model, errors.mean(1))
            for kind, share in _wrong_ends(goes_on.unflatten(0, (-1, DRAWS)), truly_goes_on).items():
                ends[kind][str(n)] = share
    return drawn, mean, ends


def _wrong_ends(goes_on: Tensor, truly_goes_on: Tensor) -> dict[str, float | None]:
    """`false`: share of ends where the task goes on; `missed`: of none where it has ended; None: of no steps.

    Args:
        goes_on: of several draws, 0 or 1, shape (steps, draws).
        truly_goes_on: 0 or 1, shape (steps,).
    """
    false, missed = 1 - goes_on[truly_goes_on > 0], goes_on[truly_goes_on == 0]
    return {kind: of.mean().item() if len(of) else None for kind, of in (("false", false), ("missed", missed))}


def _single_steps(
    model: TransitionModel, training: Transitions, held_out: Transitions, generator: torch.Generator
) -> dict[str, Any]:
    rows = _choose(held_out.starts, STEPS, generator)
    truth, rewards = _states(model, held_out, rows + 1), held_out.learned_rewards(rows).to(model.device)
    states, actions = _states(model, held_out, rows), held_out.decisions(rows).to(model.device)
    varies = (truth - states).std(0, correction=0) > 0  # a constant has no spread to be checked
    distances = _distances(model, training, states, actions)
    quarters = distances.argsort().chunk(4)
    by_distance: dict[str, list[list[float]]] = {}
    coverage, reward_error, ends = {}, {}, {}
    for name, sampler in model.samplers().items():
        outcome = _several(model, sampler, states, actions, generator)
        next_states = outcome.observations.unflatten(0, (-1, SAMPLES))
        coverage[name] = {
            f"{share:.0%}": _inside(next_states, truth, share)[:, varies].float().mean().item() for share in CENTRAL
        }
        missed_by = next_states - truth[:, None]
        by_distance[name] = [[distances[each].mean().item(), _error(model, missed_by[each])] for each in quarters]
        errors = outcome.rewards.unflatten(0, (-1, SAMPLES)) - rewards[:, None]
        reward_error[name] = errors.square().mean().sqrt().item()
        ends[name] = _ends_of_one_step(model, sampler, held_out, generator)
    of_one_step = {"ends_of_one_step": ends, "error_by_distance": by_distance}
    return {"coverage": coverage, "reward_error": reward_error} | of_one_step


def _distances(model: TransitionModel, training: Transitions, states: Tensor, actions: Tensor) -> Tensor:
    """Of pairs from the nearest ones of the training data, shape (steps,).

    Root mean squares over the dimensions, in standard deviations of the states and units of actions.
    """

    def pairs(states: Tensor, actions: Tensor) -> Tensor:
        return torch.cat([states / model.observation_std, actions], dim=-1)

    here = pairs(states, actions)
    rows = training.starts[:: -(-len(training.starts) // TRAINING_PAIRS)]
    nearest = []
    for some in rows.split(AT_ONCE):
        there = pairs(_states(model, training, some), training.decisions(some).to(model.device))
        nearest.append(torch.cdist(here, there, compute_mode=EXACT).amin(1))
    return torch.stack(nearest).amin(0) / here.shape[1] ** 0.5


def _ends_of_one_step(
    model: TransitionModel, sampler: Sampler, held_out: Transitions, generator: torch.Generator
) -> dict[str, float | None]:
    """`false` and `missed` ends, of steps with which the task goes on and of such with which it ends."""
    goes_on = _goes_on(model, held_out, held_out.starts).to(held_out.device) > 0
    rows = torch.cat([_choose(held_out.starts[kind], STEPS, generator) for kind in (goes_on, ~goes_on)])
    states, actions = _states(model, held_out, rows), held_out.decisions(rows).to(model.device)
    outcome = _several(model, sampler, states, actions, generator)
    return _wrong_ends(outcome.continues.unflatten(0, (-1, SAMPLES)), _goes_on(model, held_out, rows))


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


def _goes_on(model: TransitionModel, data: Transitions, rows: Tensor) -> Tensor:
    """Whether the task goes on after the steps from these rows, 0 or 1, shape (rows,)."""
    return (data.masks.index_select(0, rows) > 0).to(model.device, model.observation_std.dtype)


def _error(model: TransitionModel, differences: Tensor) -> float:
    """Root mean square of differences between observations, in units of their standard deviations."""
    return (differences / model.observation_std).square().mean().sqrt().item()


def draw_transitions(found: dict[str, Any], path: Path) -> None:
    """A picture of what `measure_transitions` found; panels of what was not measured are left out.

    Args:
        found: by `measure_transitions`.
        path: of the PNG.
    """
    draw_of: dict[str, Callable[[Axes, Any], None]] = {
        "error": _draw_errors,
        "coverage": _draw_coverage,
        "error_by_distance": _draw_by_distance,
        "spread": _draw_spread,
    }
    panels = [key for key in draw_of if key in found]
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, key in zip(axes, panels, strict=False):
        draw_of[key](axis, found[key])
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


def _draw_by_distance(axis: Axes, by_distance: dict[str, list[list[float]]]) -> None:
    for name, pairs in by_distance.items():
        axis.plot(*zip(*pairs, strict=True), marker="o", label=name)
    axis.set(xlabel="distance of state and action from the training data", xlim=(0, None))
    axis.set(ylabel="standard deviations of the state", ylim=(0, None))
    axis.set_title("error of one step, off the data")


def _draw_spread(axis: Axes, spread: dict[str, dict[str, float]]) -> None:
    for name, by_move in spread.items():
        axis.plot([float(move) for move in by_move], list(by_move.values()), marker="o", label=name)
    axis.set(xlabel="actions moved by", ylabel="standard deviations of the state", ylim=(0, None))
    axis.set_title("spread of one step, actions off the data")
