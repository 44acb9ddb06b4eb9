"""Calling a network without moving it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def frozen_call(module: nn.Module, *arguments: Tensor) -> Any:
    """What `module` gives, with a gradient into the arguments but none into its own parameters."""
    frozen = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, frozen, arguments)
