"""The networks' non-linearities."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deflow.nets.activation import activate


def test_mish_is_torchs() -> None:
    x = torch.cat([torch.linspace(-100, 100, 10_001), torch.tensor([-1e30, 1e30])]).requires_grad_()
    ours, exact = activate(x, "mish"), F.mish(x.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-20)
    (of_ours,), (of_exact,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(exact.sum(), x)
    torch.testing.assert_close(of_ours, of_exact, rtol=1e-5, atol=1e-5)
    assert activate(torch.tensor(torch.nan), "mish").isnan()
