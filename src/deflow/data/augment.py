"""Random crops: the augmentation of images."""

from __future__ import annotations

import torch
from torch import Tensor

from deflow.types import Batch

PADDING = 3  # pixels by which an image is extended on every side, its border repeated, before it is cut to size again


def draw_shifts(rows: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draw the pixels by which `crop` shifts a batch's images, all at random or all by none; int64, shape (2, rows).

    Source: OGBench's and FQL's reference code.

    Args:
        rows: of the batch.
        probability: that its images are shifted, in (0, 1].
        generator: of the draws, on the CPU.
    """
    if torch.rand((), generator=generator) >= probability:
        return torch.zeros(2, rows, dtype=torch.int64)
    return torch.randint(2 * PADDING + 1, (2, rows), generator=generator) - PADDING


def crop(batch: Batch, shifts: Tensor) -> Batch:
    """The batch with its images shifted, `s` and `s'` of a transition by the same; see `draw_shifts`."""
    if shifts.is_cpu and not shifts.any():
        return batch
    move = shift if shifts.is_cpu else shift_on_device
    return batch._replace(
        observations=move(batch.observations, shifts), next_observations=move(batch.next_observations, shifts)
    )


def shift_on_device(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift pixel by pixel, which is slower than `shift` on a CPU, but waits for nothing."""
    batch, frames, height, width, _ = images.shape
    device = images.device
    rows = (torch.arange(height, device=device) + shifts[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + shifts[1, :, None]).clamp(0, width - 1)
    of_batch = torch.arange(batch, device=device).view(batch, 1, 1, 1)
    of_frames = torch.arange(frames, device=device).view(1, frames, 1, 1)
    return images[of_batch, of_frames, rows[:, None, :, None], columns[:, None, None, :]]


def shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Images moved up and to the left, the border repeated where they end.

    Args:
        images: shape (batch, frames, height, width, channels).
        shifts: pixels up and to the left, int64 of shape (2, batch).
    """
    # Whole rows of pixels at a time, then whole columns of all images that move alike: to pick single pixels would take
    # ten times as long.
    batch, frames, height, *_ = images.shape
    rows = (torch.arange(height) + shifts[0, :, None]).clamp(0, height - 1)
    first = height * torch.arange(batch * frames).reshape(batch, frames, 1)
    moved = images.flatten(0, 2).index_select(0, (first + rows[:, None]).flatten()).reshape(images.shape)
    pixels, counts = shifts[1].unique(return_counts=True)
    order = shifts[1].argsort()
    alike = moved.index_select(0, order).split(counts.tolist())
    ordered = torch.cat([_to_the_left(some, left) for some, left in zip(alike, pixels.tolist(), strict=True)])
    return ordered.index_select(0, order.argsort())


def _to_the_left(images: Tensor, pixels: int) -> Tensor:
    """All images moved alike; to the right if `pixels` is negative."""
    width = images.shape[-2]
    kept = images.narrow(-2, max(pixels, 0), width - abs(pixels))
    border = (kept[..., -1:, :] if pixels > 0 else kept[..., :1, :]).expand(*kept.shape[:-2], abs(pixels), -1)
    return torch.cat([kept, border] if pixels > 0 else [border, kept], dim=-2)
