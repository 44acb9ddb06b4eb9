"""Values beside what held-out trajectories earned: of an agent that knows, of one that does not, and of none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deflow.data.memory.transitions import Transitions
from deflow.evaluation.values import measure_values
from deflow.types import Lookahead, Spec
from tests.agents.tester import Acting

DISCOUNT = 0.9


def countdown(length: int = 30, trajectories: int = 4) -> Transitions:
    """States count the steps to the end, where the task ends; each costs 1."""
    left = np.arange(length, -1, -1, dtype=np.float32)
    columns: dict[str, Any] = {"observations": left[:, None], "actions": np.zeros((length + 1, 1))}
    columns |= {"rewards": -(left > 0).astype(np.float32), "masks": left > 1, "valids": left > 0}
    return Transitions.from_compact({name: np.concatenate([c] * trajectories) for name, c in columns.items()}, "left")


class Knowing(Acting):
    scale, shift = 1.0, 0.0

    def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def action_values(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        of_the_end = -(1 - DISCOUNT ** observations[:, 0]) / (1 - DISCOUNT)
        return self.scale * of_the_end + self.shift


@pytest.mark.parametrize(
    "scale,shift,correlation", [(1.0, 0.0, 1.0), (1.0, 2.0, 1.0), (-1.0, 0.0, -1.0), (0.0, 1.0, None)]
)
def test_an_agent_that_knows(scale: float, shift: float, correlation: float | None) -> None:
    agent = Knowing(Spec(1, 1))
    agent.scale, agent.shift = scale, shift
    found = measure_values(agent, countdown(), Lookahead(DISCOUNT), seed=0)
    assert found is not None
    assert found["transitions"] == 120
    if correlation is None:
        assert found["correlation"] is None
    else:
        assert found["correlation"] == pytest.approx(correlation, abs=1e-5)
    if scale == 1:
        assert found["bias"] == pytest.approx(shift, abs=1e-4)


def test_an_agent_without_values_has_none() -> None:
    class Unknowing(Acting):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    assert measure_values(Unknowing(Spec(1, 1)), countdown(), Lookahead(DISCOUNT), seed=0) is None
