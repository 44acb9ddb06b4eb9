"""What stands between an observation and a network: nothing for states, a convolutional network for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deflow.errors import UserError
from deflow.nets.activation import activate
from deflow.ranges import Activation
from deflow.types import Spec


class Encoder(nn.Module):
    """Observations -> features of shape (batch, width). This one gives states as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, observations: Tensor) -> Tensor:
        return observations


class Impala(Encoder):
    """Features of images, uint8 of shape (batch, frames, height, width, channels): frames become channels.

    Each stack is a convolution, max pooling by two, and residual blocks of two more convolutions; a linear layer comes
    last. Source: IMPALA (arXiv 1802.01561) as in FQL's reference code, whose `impala_small` is the default.

    Args:
        image: frames, height, width and channels.
        stacks: channels of each stack.
        blocks: residual blocks of each stack.
        features: width of what comes out.
        activation: of what comes out; inside it is ReLU.

    Raises:
        UserError: if pooling would leave nothing of the image.
    """

    def __init__(
        self,
        image: Sequence[int],
        stacks: Sequence[int] = (16, 32, 32),
        blocks: int = 1,
        features: int = 512,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(features)
        frames, height, width, channels = image
        if min(height, width) < 2 ** len(stacks):
            raise UserError(f"images of {height}x{width} are too small for {len(stacks)} stacks, which halve them each")
        self.stacks = nn.ModuleList(
            _Stack(before, after, blocks) for before, after in zip((frames * channels, *stacks), stacks, strict=False)
        )
        for _ in stacks:
            height, width = -(-height // 2), -(-width // 2)
        self.linear = nn.Linear(height * width * stacks[-1], features)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.activation: Activation = activation

    def forward(self, observations: Tensor) -> Tensor:
        # Channels stay last in memory, where a GPU's convolutions want them.
        x = (observations.movedim(-4, -2).flatten(-2).float() / 255.0).movedim(-1, -3)
        for stack in self.stacks:
            x = stack(x)
        return activate(self.linear(F.relu(x).flatten(-3)), self.activation)


class _Stack(nn.Module):
    def __init__(self, before: int, after: int, blocks: int) -> None:
        super().__init__()
        self.first = _convolution(before, after)
        self.blocks = nn.Sequential(*(_Residual(after) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        # The padding that XLA calls SAME, for a window of 3 and a stride of 2: an odd row or column goes to the end.
        x = self.first(x)
        padding = [side for size in (x.shape[-1], x.shape[-2]) for side in (size % 2, 1)]
        return self.blocks(F.max_pool2d(F.pad(x, padding, value=-torch.inf), kernel_size=3, stride=2))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = _convolution(channels, channels), _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(F.relu(x))))


def _convolution(before: int, after: int) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, kernel_size=3, padding=1)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def beside(features: Tensor, *more: Tensor) -> Tensor:
    """Features with `more` in the same row; each row of features serves equally many consecutive ones of `more`.

    So several actions of one state cost one encoding of it.
    """
    return torch.cat([repeat_to(features, len(more[0])), *more], dim=-1) if more else features


def repeat_to(x: Tensor, rows: int) -> Tensor:
    """Each row of `x` repeated equally often, one after the other, so that there are `rows`."""
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), dim=0)


def make_encoder(spec: Spec, activation: Activation, settings: Mapping[str, Any] | None) -> Encoder:
    """A new encoder of a task's observations.

    Args:
        spec: sizes of the task.
        activation: of an image's features.
        settings: further arguments of `Impala`; not read for states.
    """
    if spec.image is None:
        return Encoder(spec.observation_dim)
    return Impala(spec.image, activation=activation, **(settings or {}))
