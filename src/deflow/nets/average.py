"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar, cast

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Average(nn.Module):
    """A slowly moving copy of a network that stands in for it in evaluation mode, in which a frozen part is too.

    Args:
        network: of which it is an average.
        decay: share of itself that it keeps at every update, in [0, 1); None is no average at all.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        super().__init__()
        self.decay = decay
        self.network = None if decay is None else copy.deepcopy(network).requires_grad_(False)

    def of(self, network: Network) -> Network:
        """The average in evaluation mode, if there is one; else `network` itself."""
        return network if self.training else self.always(network)

    def always(self, network: Network) -> Network:
        """The average, if there is one, also while it follows; else `network` itself."""
        return network if self.network is None else cast(Network, self.network)

    def pairs(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor, float]]:
        """`(online, average, share)` of every parameter, for a Polyak step."""
        if self.network is not None and self.decay is not None:
            yield from polyak_pairs(network, self.network, 1 - self.decay)


def polyak_pairs(online: nn.Module, target: nn.Module, tau: float) -> Iterator[tuple[Tensor, Tensor, float]]:
    """`(online, target, tau)` of every parameter, for the agent's Polyak step."""
    for of_online, of_target in zip(online.parameters(), target.parameters(), strict=True):
        yield of_online, of_target, tau
