"""The optimizer of an agent, with what a part may have of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NotRequired, TypedDict

import torch
from torch.optim import Optimizer

from deflow.ranges import Betas, NonNegative, Positive


class PartSettings(TypedDict):
    """What a part may have of its own."""

    lr: NotRequired[Positive]
    weight_decay: NotRequired[NonNegative]
    clip: NotRequired[Positive | None]


class PartwiseAdam:
    """Adam with decoupled weight decay (which is Adam where the decay is 0), a parameter group for each part.

    Args:
        lr: learning rate, unless a stage says another.
        weight_decay: share of a weight that goes in a step of rate 1.
        clip: largest norm of a part's gradient, all of its tensors together; None leaves it as it is.
        parts: what is otherwise for a part.
        betas: shares that the averages of the gradient and of its square keep, in [0, 1).
        fused: one kernel for all tensors of a group.
    """

    recordable = True  # on a GPU, see `OneLaunch`

    def __init__(
        self,
        lr: Positive = 3e-4,
        weight_decay: NonNegative = 0.0,
        clip: Positive | None = None,
        parts: Mapping[str, PartSettings] = MappingProxyType({}),
        betas: Betas = (0.9, 0.999),
        fused: bool = True,
    ) -> None:
        self._settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "fused": fused}
        self.clip = clip
        self.parts = {name: dict(settings) for name, settings in parts.items()}

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
        """An optimizer of parameter groups that are named after their part; what a group says itself goes first."""
        common = {"clip": self.clip}
        named = [{**common, **self.parts.get(group["name"], {}), **group} for group in groups]
        on_gpu = groups[0]["params"][0].is_cuda  # what the optimizer keeps is then there, too
        return torch.optim.AdamW(named, capturable=on_gpu, **self._settings)
