"""What the studies' figures stand on, and is not in the package."""

from __future__ import annotations

import runpy

import torch

from tests.commands import ROOT


def test_products_in_float32_are_those_of_bfloat16_hardware() -> None:
    Float32Products = runpy.run_path(str(ROOT / "studies" / "float32_products.py"))["Float32Products"]
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)

    def of_layer() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]

    native = of_layer()
    with Float32Products():
        emulated = of_layer()
    assert [value.dtype for value in emulated] == [value.dtype for value in native]
    for ours, theirs in zip(emulated, native, strict=True):
        # One unit in the last of bfloat16's eight places: sums of another order may round to a neighbour.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))

    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with Float32Products():
        product = a @ b
    assert torch.equal(product, a @ b)  # others are left alone
