"""Proposals of a frozen BehaviorFlow, computed once for every state instead of solving the ODE at every update."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from deflow.data.caching import content_key
from deflow.data.memory.transitions import Transitions
from deflow.files import locked, replacing
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.seeding import torch_generator

log = logging.getLogger(__name__)

# Rows of one solve: large enough for full matrix-product speed, small enough to stay in cache.
SOLVE_ROWS = 8192


class ProposalCache:
    """`count` proposals for every state of a data set, drawn at random for `s` and for `s'`.

    Args:
        proposals: float16, shape (rows, count, action_dim); half precision is 5e-4 of an action's range.
    """

    def __init__(self, proposals: Tensor) -> None:
        self._count = proposals.shape[1]
        self._flat = proposals.flatten(0, 1)

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Which of its proposals each of so many states is to get, int64."""
        return torch.randint(self._count, (rows,), generator=generator)

    def of(self, rows: Tensor, picks: Tensor) -> Tensor:
        """The proposals of the states `rows` that were drawn, float32, shape (batch, action_dim)."""
        return self._flat.index_select(0, rows * self._count + picks).float()

    def to(self, device: torch.device) -> ProposalCache:
        """The same on a device."""
        return ProposalCache(self._flat.unflatten(0, (-1, self._count)).to(device))

    @property
    def nbytes(self) -> int:
        """Memory that the proposals take."""
        return self._flat.nbytes

    @classmethod
    def load_or_compute(
        cls, flow: BehaviorFlow, transitions: Transitions, count: int, seed: int, path: Path
    ) -> ProposalCache:
        """The cache in `path` if it is of this flow, data, count and seed; otherwise computed and written there.

        Args:
            flow: the frozen flow.
            transitions: the data; every state gets proposals.
            count: proposals for each state.
            seed: of the noise.
            path: `.npy` file; its key lies beside it, so that a stale cache is never used. A damaged one is made anew.
        """
        key = _key(flow, transitions, count, seed)
        key_path = path.with_suffix(".key")
        shape = (len(transitions.states), count, flow.spec.action_dim)
        with locked(path.with_suffix(".lock"), "the cached proposals"):  # the first rank computes, the others find them
            found = key_path.exists() and key_path.read_bytes() == key.encode()
            proposals = _read(path, shape) if found else None
            if proposals is None:
                key_path.unlink(missing_ok=True)
                started = time.perf_counter()
                with replacing(path) as part:
                    _compute(flow, transitions, count, seed, part)
                with replacing(key_path) as part:
                    part.write_text(key)
                seconds, mebibytes = time.perf_counter() - started, path.stat().st_size / 2**20
                log.info("%d proposals a state: %.0f MiB in %.1f s", count, mebibytes, seconds)
                proposals = np.load(path, mmap_mode="c")
        return cls(torch.from_numpy(proposals))


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What is in the file, mapped into memory, as it may be larger; None if that is not what it should be."""
    try:
        proposals = np.load(path, mmap_mode="c")
        if (proposals.shape, proposals.dtype) == (shape, np.float16):
            return proposals
    except (OSError, ValueError, EOFError):  # missing, cut short, or something else
        pass
    log.warning("%s is damaged: computing the proposals anew", path)
    return None


@torch.no_grad()
def _compute(flow: BehaviorFlow, transitions: Transitions, count: int, seed: int, path: Path) -> None:
    action_dim, rows = flow.spec.action_dim, len(transitions.states)
    proposals = np.lib.format.open_memmap(path, "w+", np.float16, (rows, count, action_dim))
    chunk = max(1, SOLVE_ROWS // count)
    for start in track(range(0, rows, chunk), description=f"{count} proposals a state"):
        here = torch.arange(start, min(start + chunk, rows))
        observations = transitions.observations(here).to(flow.device)
        generator = torch_generator(flow.device, seed, "proposals", start)
        z = torch.randn(len(here) * count, action_dim, generator=generator, device=flow.device)
        solved = flow.propose(observations, z)
        proposals[start : start + chunk] = solved.reshape(-1, count, action_dim).half().cpu().numpy()
    proposals.flush()


def _key(flow: BehaviorFlow, transitions: Transitions, count: int, seed: int) -> str:
    settings = {"count": count, "seed": seed, "solver": str(flow.solver), "frames": transitions.frames}
    weights = {name: weight.detach().cpu().numpy() for name, weight in flow.state_dict().items()}
    return content_key(settings, {"states": transitions.states.numpy()} | weights)
