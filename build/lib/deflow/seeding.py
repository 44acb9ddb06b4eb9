"""Randomness without state: every draw is a function of the seed and of where in the run it happens.

Nothing has to be saved to resume to the same bits, and no rank, stage or evaluation shifts another's draws.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def fold_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` (non-negative whole numbers or names), in their order."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def torch_generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A torch generator on `device`, seeded by `parts`."""
    return torch.Generator(device).manual_seed(fold_seed(*parts))
