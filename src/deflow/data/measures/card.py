"""Data card: what a data set holds, and in plain words what looks wrong with it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deflow.data.sources.columns import Arrays
from deflow.files import replacing
from deflow.units import AS_THEY_ARE, Units

SATURATED = 0.99  # an action component beyond this counts as saturated
# Slow dimensions of the state (positions) move by less than this share of their standard deviation in usual steps, the
# smallest 99%; a step that exceeds this multiple of them in half of the slow dimensions is a jump.
SLOW, JUMP, USUAL = 0.3, 1.5, 0.99
ENDS = 3  # for each trajectory so many of its steps may be jumps, and are not asked what is usual
DRAWN_ROWS = 100_000
LOOKED_AT = 50_000  # rows, at the start of a training

log = logging.getLogger(__name__)


def describe(arrays: Arrays, units: Units = AS_THEY_ARE) -> dict[str, Any]:
    """Counts, ranges (without NaN) and faults of data in compact layout (see `Source`), as plain values.

    Args:
        arrays: the data.
        units: of their actions, which say what is at a policy's limit or beyond it.
    """
    observations, actions = arrays["observations"], arrays["actions"]
    valid = np.asarray(arrays["valids"]) > 0
    valid[-1] = False
    rewards, masks = arrays["rewards"][valid], arrays["masks"][valid]
    finite = np.isfinite(observations).all(1) & np.isfinite(actions).all(1) & np.isfinite(arrays["rewards"])
    lengths = _trajectory_lengths(valid)
    taken = actions[valid]
    decided = np.abs(units.decided(taken))
    card: dict[str, Any] = {
        "transitions": int(valid.sum()),
        "trajectories": len(lengths),
        "trajectory_length": _range(lengths),
        "observation_dim": observations.shape[1],
        "action_dim": actions.shape[1],
        "rewards": _range(rewards) | {"distinct": len(np.unique(rewards))},
        "task_ends": int((masks == 0).sum()),  # masks of 0: no bootstrapping beyond
        "action_range": [_range(column) for column in taken.T],
        "saturated_share": float((decided > SATURATED).mean()),
        "rows_with_actions_outside": int((decided > 1 + 1e-6).any(1).sum()),
        "rows_not_finite": int((~finite).sum()),
        "repeated_transitions": _repeats(observations[valid], taken),
        "jumps_inside_trajectories": _jumps(observations, valid & finite & np.append(finite[1:], False), len(lengths)),
    }
    return card | {"warnings": warnings_of(card)}


def warnings_of(card: dict[str, Any]) -> list[str]:
    """The known faults of data sets that a card shows, each in a sentence."""
    found = []
    if card["task_ends"] == 0:
        found.append("masks are all 1: no transition ends the task, so the value of reaching the goal is never seen")
    if card["rewards"]["distinct"] == 1:
        found.append(f"all rewards are {card['rewards']['mean']:g}: there is nothing to learn from them")
    if card["jumps_inside_trajectories"]:
        found.append(
            f"{card['jumps_inside_trajectories']} next observations lie far from the state before them: terminals are "
            "missing or misplaced, and two trajectories are taken for one"
        )
    if card["trajectory_length"]["max"] <= 1:
        found.append("every trajectory has one transition: terminals look inverted")
    if card["rows_with_actions_outside"]:
        found.append(
            f"{card['rows_with_actions_outside']} rows have actions outside what a policy decides; they will be clipped"
        )
    if card["saturated_share"] > 0.5:
        found.append(f"{card['saturated_share']:.0%} of the action components are at their limit")
    if card["rows_not_finite"]:
        found.append(f"{card['rows_not_finite']} rows have NaN or infinite values; training will refuse them")
    share = card["repeated_transitions"] / card["transitions"]
    if share > 0.01:
        found.append(f"{share:.0%} of the transitions are repeated")
    return found


def draw(arrays: Arrays, title: str, path: Path) -> None:
    """States visited (x, y in a maze), actions, rewards and trajectory lengths in one picture."""
    valid = np.asarray(arrays["valids"]) > 0
    rows = np.flatnonzero(valid)
    if len(rows) > DRAWN_ROWS:
        rows = np.random.default_rng(0).choice(rows, DRAWN_ROWS, replace=False)
    states, actions = np.nan_to_num(arrays["observations"][rows]), np.nan_to_num(arrays["actions"][rows])
    figure = Figure(figsize=(16, 4), layout="constrained")
    figure.suptitle(title)
    coverage, histogram, reward, length = figure.subplots(1, 4)
    if states.shape[1] > 1:
        coverage.hist2d(states[:, 0], states[:, 1], bins=80, norm="log", cmap="viridis")
        coverage.set(title="states, first two dimensions", aspect="equal")
    else:
        coverage.hist(states[:, 0], bins=80)
        coverage.set(title="states")
    histogram.violinplot(actions, showextrema=False, widths=0.9)
    histogram.set(title="actions by dimension", ylim=(-1.1, 1.1))
    reward.hist(np.nan_to_num(arrays["rewards"][rows]), bins=30, log=True)
    reward.set(title="rewards")
    length.hist(_trajectory_lengths(valid), bins=30)
    length.set(title="trajectory lengths")
    with replacing(path) as part:
        figure.savefig(part, dpi=80)


def print_card(title: str, card: dict[str, Any]) -> None:
    """The card as a table on the terminal, its warnings below."""
    table = Table(title=title, show_header=False)
    for key, value in card.items():
        if key not in ("warnings", "action_range"):
            table.add_row(key.replace("_", " "), _shown(value))
    low, high = min(r["min"] for r in card["action_range"]), max(r["max"] for r in card["action_range"])
    table.add_row("actions", f"{low:.3f} to {high:.3f}")
    console = Console()
    console.print(table)
    for warning in card["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", soft_wrap=True)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _range(values: np.ndarray) -> dict[str, float]:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return {"min": math.nan, "mean": math.nan, "max": math.nan}
    return {"min": float(np.min(values)), "mean": float(np.mean(values)), "max": float(np.max(values))}


def _trajectory_lengths(valid: np.ndarray) -> np.ndarray:
    """Transitions of each trajectory: the runs of valid rows."""
    edges = np.diff(np.concatenate([[0], valid.astype(np.int8), [0]]))
    return np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)


def _jumps(observations: np.ndarray, valid: np.ndarray, trajectories: int) -> int:
    """Successors that lie implausibly far away, measured in those dimensions that else move little in a step."""
    rows = np.flatnonzero(valid)
    if len(rows) == 0:
        return 0
    steps = np.abs(observations[rows + 1] - observations[rows])
    asked = min(USUAL, max(0.5, 1 - ENDS * trajectories / len(rows)))
    usual = np.quantile(steps, asked, axis=0) * _of_normal(USUAL) / _of_normal(asked)
    slow = (usual > 0) & (usual < SLOW * observations[rows].std(0))
    return int((np.median(steps[:, slow] / usual[slow], axis=1) > JUMP).sum()) if slow.any() else 0


def _of_normal(share: float) -> float:
    """How many standard deviations this share of normally distributed steps stays below."""
    return NormalDist().inv_cdf((1 + share) / 2)


def _repeats(observations: np.ndarray, actions: np.ndarray) -> int:
    """Transitions that are in the data more than once, not counting their first time."""
    rows = np.ascontiguousarray(np.concatenate([observations, actions], axis=1, dtype=np.float32))
    return len(rows) - len(np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}")))  # a row as one value


def warn_of(arrays: Arrays, origin: str) -> None:
    """Log the known faults that the first rows of the data show, in a fraction of a second; nothing of images."""
    if arrays["observations"].ndim > 2:
        return
    card = describe({name: np.array(column[:LOOKED_AT]) for name, column in arrays.items()})
    for warning in card["warnings"]:
        log.warning("%s: %s", origin, warning)
