"""The networks' non-linearity."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deflow.ranges import Activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply a non-linearity by its name.

    `gelu` is the exact (erf) one; `gelu_tanh` the original code's form of it, over four times dearer on a CPU and
    < 1e-3 away. `relu`, `mish` and `silu` are other original codes'.
    """
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "mish":
            return mish(x)
        case "silu":
            return F.silu(x)


def mish(x: Tensor) -> Tensor:
    r"""`x tanh(ln(1 + e^x))`, on a CPU by a single exponential.

    torch's own takes up to ten times as long there once both are compiled: with :math:`n = e^x (e^x + 2)` the
    hyperbolic tangent is :math:`n / (n + 2)`, which is 1 long before n overflows.
    """
    if x.device.type != "cpu":
        return F.mish(x)  # one kernel
    exponential = x.clamp(max=20.0).exp()
    n = exponential * (exponential + 2)
    return x * (n / (n + 2))
