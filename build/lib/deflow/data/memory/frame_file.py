"""Frames of images on disk, each once, for a replay that holds only their numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deflow.files import open_to_append, sync

# Last frames among which one that comes again is recognised: those of the steps under way in many environments.
RECENT = 4096


class FrameFile:
    """Images of one shape in a file that is only ever appended to; what is read often stays in the system's cache.

    Args:
        path: of the file.
        shape: height, width and channels of a frame.
        count: frames to take over from the file; the rest of it is cut off.

    Raises:
        UserError: if the file holds fewer.
    """

    def __init__(self, path: Path, shape: Sequence[int], count: int) -> None:
        self._path, self._shape, self.count = path, tuple(shape), count
        self._file = open_to_append(path, count * int(np.prod(self._shape)), "images that the replay speaks of")
        self._numbers: dict[bytes, int] = {}
        self._mapped = np.empty((0, *self._shape), np.uint8)

    def add(self, frames: Tensor) -> Tensor:
        """Numbers of frames, shape (n,), given as uint8 of shape (n, height, width, channels)."""
        return torch.tensor([self._add(frame.tobytes()) for frame in frames.contiguous().numpy()], dtype=torch.int64)

    def read(self, numbers: Tensor) -> Tensor:
        """Frames by their numbers, which `add` gave: (n,) -> uint8 of shape (n, height, width, channels)."""
        if len(self._mapped) < self.count:
            self._file.flush()
            self._mapped = np.memmap(self._path, np.uint8, "r", shape=(self.count, *self._shape))
        return torch.from_numpy(self._mapped[numbers.numpy()])

    def flush(self) -> None:
        """See to it that all that was added is on disk."""
        sync(self._file)

    def _add(self, frame: bytes) -> int:
        digest = hashlib.blake2b(frame, digest_size=16).digest()
        number = self._numbers.pop(digest, None)
        if number is None:
            number = self.count
            self._file.write(frame)
            self.count += 1
        self._numbers[digest] = number  # the newest last
        if len(self._numbers) > RECENT:
            del self._numbers[next(iter(self._numbers))]
        return number
