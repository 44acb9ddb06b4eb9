"""What FBRAC's gradient through the ODE costs: back-propagation and the adjoint method against the solver's steps.

python studies/fbrac_gradient.py    prints the table of docs/results/speed.md; each row is a process of its own
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from statistics import median

import torch

from deflow.flow.ode import Gradient, Solver
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.types import Spec

STEPS, GRADIENTS = (5, 10, 20, 40), ("backprop", "adjoint")
TIMED_BATCH, LARGE_BATCH, REPEATS = 256, 8192, 7


def measure(gradient: Gradient, steps: int) -> None:
    """Print milliseconds with the papers' batch, MiB of peak memory with a large one, and the gradient's error."""
    torch.manual_seed(0)
    flow = BehaviorFlow(Spec(observation_dim=29, action_dim=8), solver=Solver(steps=steps))
    backward(flow, TIMED_BATCH, gradient)  # warm-up
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        backward(flow, TIMED_BATCH, gradient)
        seconds.append(time.perf_counter() - started)
    reference, other = (backward(flow, TIMED_BATCH, kind) for kind in ("backprop", gradient))
    error = ((other - reference).norm() / reference.norm()).item()
    before = peak_mib()
    backward(flow, LARGE_BATCH, gradient)
    print(f"{1e3 * median(seconds):.0f} ms | {peak_mib() - before:.0f} MiB | {100 * error:.1f}%")


def backward(flow: BehaviorFlow, batch: int, gradient: Gradient) -> torch.Tensor:
    """The gradient of a function of the flow's samples, as one vector."""
    generator = torch.Generator().manual_seed(0)
    observations, z = torch.randn(batch, 29, generator=generator), torch.randn(batch, 8, generator=generator)
    flow.zero_grad()
    flow.sample(observations, z, gradient).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in flow.parameters() if parameter.grad is not None])


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table() -> None:
    print("| steps | gradient | time, batch 256 | memory, batch 8192 | differs from back-propagation by |")
    print("|---|---|---|---|---|")
    for steps in STEPS:
        for gradient in GRADIENTS:
            command = [sys.executable, __file__, gradient, str(steps)]
            row = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            print(f"| {steps} | {gradient} | {row} |", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            table()
        case ["backprop" | "adjoint" as gradient, steps]:
            measure(gradient, int(steps))
        case _:
            sys.exit(__doc__)
