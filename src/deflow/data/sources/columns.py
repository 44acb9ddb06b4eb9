"""Columns as they come from files: whatever cannot be meant is refused here, by name, for every source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deflow.errors import UserError

Arrays = dict[str, np.ndarray]

TABLES = ("observations", "actions", "next_observations")  # two axes, (rows, size)
FLAGS = ("terminals", "timeouts")
MOSTLY = 0.5  # a share of rows above which a flag that ends the task is taken for its opposite
HOLDS_OBJECTS = (
    "holds objects, such as episodes of different lengths: put them one after the other, one row a transition, "
    "and say in terminals and timeouts where they end"
)


def checked_columns(columns: Mapping[str, np.ndarray], origin: str) -> Arrays:
    """Columns with one row a transition as the rest of the package takes them.

    Args:
        columns: `observations`, `actions`, `rewards` and, if there are, `next_observations`, `terminals`, `timeouts`.
        origin: what to call the file in an error.

    Returns:
        The same columns; rewards and flags with one axis, flags as booleans.

    Raises:
        UserError: naming the column and what stands in it, for lengths that differ, shapes, types, flags that are not
            exactly 0 or 1, or terminals that look like masks.
    """
    _check_lengths(columns, origin)
    _check_actions(columns["actions"], origin)
    found: Arrays = {}
    for name, column in columns.items():
        column = _numbers(column, name, origin)
        if name in TABLES:
            found[name] = _with_two_axes(column, name, origin)
        elif name in FLAGS:
            found[name] = flags(column, name, origin)
        else:
            found[name] = with_one_axis(column, name, origin)
    _check_successors(found["observations"], found.get("next_observations"), origin)
    _check_terminals(found.get("terminals"), origin)
    return found


def with_one_axis(column: np.ndarray, name: str, origin: str) -> np.ndarray:
    """A column of shape (rows,) or (rows, 1) as (rows,).

    Raises:
        UserError: for another shape.
    """
    if column.ndim == 2 and column.shape[1] == 1:
        return column[:, 0]
    if column.ndim != 1:
        raise UserError(f"{origin}: '{name}' must have one number a row, got the shape {column.shape}")
    return column


def flags(column: np.ndarray, name: str, origin: str) -> np.ndarray:
    """A column of flags as booleans of shape (rows,).

    Raises:
        UserError: if a value is not exactly 0 or 1, NaN included.
    """
    column = with_one_axis(column, name, origin)
    bad = column[(column != 0) & (column != 1)]  # NaN is neither
    if len(bad):
        raise UserError(f"{origin}: '{name}' must be 0 or 1 (or false or true) in every row, {len(bad)} hold {bad[0]}")
    return column.astype(bool)


def _check_lengths(columns: Mapping[str, np.ndarray], origin: str) -> None:
    lengths = {name: len(column) if column.ndim else 0 for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{origin}: columns of different lengths ({lengths})")
    if not lengths["actions"]:
        raise UserError(f"{origin}: its columns hold no rows")


def _numbers(column: np.ndarray, name: str, origin: str) -> np.ndarray:
    if column.dtype == object:
        raise UserError(f"{origin}: '{name}' {HOLDS_OBJECTS}")
    if column.dtype.kind not in "biuf":
        raise UserError(f"{origin}: '{name}' must hold numbers, got {column.dtype} such as {column.flat[0]!r}")
    return column.astype(np.float32) if column.dtype == bool else column


def _with_two_axes(column: np.ndarray, name: str, origin: str) -> np.ndarray:
    if column.ndim != 2:
        images = "; images are not read" if column.ndim > 2 else ""
        raise UserError(f"{origin}: '{name}' must have two axes (rows, size), got the shape {column.shape}{images}")
    return column


def _check_successors(observations: np.ndarray, successors: np.ndarray | None, origin: str) -> None:
    if successors is not None and successors.shape != observations.shape:
        raise UserError(
            f"{origin}: 'next_observations' have the shape {successors.shape}, 'observations' {observations.shape}"
        )


def _check_actions(actions: np.ndarray, origin: str) -> None:
    if actions.dtype.kind not in "biu" or actions.size == 0:
        return
    is_single = actions.ndim == 1 or actions.shape[1] == 1
    if is_single or np.abs(actions.astype(np.int64)).max() > 1:
        raise UserError(
            f"{origin}: 'actions' are whole numbers up to {actions.max():d}: discrete actions, which no agent here "
            "takes (amounts, such as steps of a motor: store them as floats)"
        )


def _check_terminals(terminals: np.ndarray | None, origin: str) -> None:
    if terminals is None:
        return
    share = terminals.mean()
    if MOSTLY < share < 1:
        raise UserError(
            f"{origin}: 'terminals' are 1 in {share:.0%} of the rows: they look like masks, which are 0 where the task "
            "ended; store 1 - masks"
        )
