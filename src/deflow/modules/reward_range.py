"""RewardRange: the lowest and the highest reward that there are, as far as training has shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deflow.distributed import max_over_ranks


class RewardRange(nn.Module):
    """What a model says of rewards is kept between these bounds, which widen as batches hold rewards outside of them.

    They are not read from the data with which a run begins, which need not hold the best reward: a stage may play, and
    `ckpt=` may go on with better data. The bounds are in units of reward and part of the weights: parameters without a
    gradient and not buffers, so that each seed of a `SeedStack` has its own. Before the first batch there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowest = nn.Parameter(torch.tensor(torch.inf), requires_grad=False)
        self.highest = nn.Parameter(torch.tensor(-torch.inf), requires_grad=False)

    @torch.no_grad()
    def widen(self, rewards: Tensor) -> None:
        """Take in rewards of a training batch, shape (batch,); in evaluation mode nothing changes."""
        if self.training:
            self.lowest.copy_(-max_over_ranks((-rewards.amin()).maximum(-self.lowest)))
            self.highest.copy_(max_over_ranks(rewards.amax().maximum(self.highest)))

    def kept(self, rewards: Tensor) -> Tensor:
        """The rewards, of any shape, none outside of the bounds."""
        return torch.where(self.lowest <= self.highest, rewards.clamp(self.lowest, self.highest), rewards)
