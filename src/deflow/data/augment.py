"""Random crops: the augmentation of images."""

from __future__ import annotations

import torch
from torch import Tensor

from deflow.types import Batch

PADDING = 3  # pixels by which an image is extended on every side, its border repeated, before it is cut to size again


def maybe_crop(batch: Batch, probability: float, generator: torch.Generator) -> Batch:
    """The batch with its images shifted, all of them or none; `s` and `s'` of a transition by the same.

    Source: OGBench's and FQL's reference code.

    Args:
        batch: of images, unless the probability is 0.
        probability: that the batch is cropped, in [0, 1]; with 0 nothing is drawn.
        generator: of the draws.
    """
    if probability == 0 or torch.rand((), generator=generator) >= probability:
        return batch
    shifts = torch.randint(2 * PADDING + 1, (2, len(batch.observations)), generator=generator) - PADDING
    return batch._replace(
        observations=shift(batch.observations, shifts), next_observations=shift(batch.next_observations, shifts)
    )


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
