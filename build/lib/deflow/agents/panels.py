"""What an agent shows of its training: the panels of `report.png`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Panel(NamedTuple):
    """Curves that belong into one picture; those that were never logged are left out."""

    title: str
    curves: Mapping[str, str]  # column of metrics.csv: its label
    log: bool = False  # whether the axis is logarithmic
    limit: float | None = None  # below which the curves are held


def loss_panel(part: str, log: bool = False) -> Panel:
    """A part's loss in training and validation."""
    curves = {f"train/{part}/loss": "train", f"val/{part}/loss": "validation"}
    return Panel(f"{part.replace('_', ' ')} loss", curves, log)


def value_panel(policy: str | None = None) -> Panel:
    """Values of the data's actions, and of those of the part `policy`, if one climbs them."""
    curves = {"train/critic/q_mean": "Q(s, a)", "train/critic/q_min": "min Q"}
    return Panel("value", curves if policy is None else curves | {f"train/{policy}/q": "Q(s, policy)"})
