"""train.py for a CPU without bfloat16 products, where torch takes ten times as long for them as for float32's.

python studies/float32_products.py [arguments of train.py]

A product of bfloat16 tensors is computed from the same bfloat16 values in float32 and rounded to bfloat16 at the end,
which is what hardware with such products does, up to the order of its sums. So `trainer.precision=bf16-mixed` can be
judged by its success where it cannot be judged by its speed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = frozenset(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))


class Float32Products(TorchDispatchMode):
    """Computes every product of bfloat16 tensors in float32."""

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, Tensor)]
        if operation not in PRODUCTS or any(tensor.dtype != torch.bfloat16 for tensor in tensors):
            return operation(*args, **kwargs)
        widened = [value.float() if isinstance(value, Tensor) else value for value in args]
        return operation(*widened, **kwargs).bfloat16()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from train import train

    with Float32Products():
        train()
