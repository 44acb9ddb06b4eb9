"""Values beside what held-out trajectories earned: of an agent that knows, of one that does not, and of none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deflow.data.memory.transitions import Transitions
from deflow.evaluation.values import measure_values
from deflow.pipeline import train as run
from deflow.types import Lookahead, Spec
from tests.agents.tester import Acting
from tests.conftest import CKPT, tiny_config

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


def test_returns_are_of_the_rows_that_are_asked_about_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: Transitions, discount: float) -> None:
        raise AssertionError("the returns of all of the data were computed")

    monkeypatch.setattr(Transitions, "with_returns", refuse)
    found = measure_values(Knowing(Spec(1, 1)), countdown(), Lookahead(DISCOUNT), seed=0)
    assert found is not None
    assert found["correlation"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("train,told", [("[dynamics]", False), ("all", True)])
def test_only_values_that_were_learned_are_measured(train: str, told: bool, point_data: Path, tmp_path: Path) -> None:
    overrides = ("agent=fql", "agent/dynamics=gaussian", f"stages.joint.train={train}", "diversity.states=0")
    config = tiny_config(point_data, "experiment=pointmaze", *overrides, "+stages.joint.evaluate=false")
    summary = run(config, tmp_path)
    assert ("values" in summary) == told
    if not told:
        frozen = ("stages.joint.train=all", "+stages.joint.freeze=[critic]")
        again = tiny_config(point_data, "experiment=pointmaze", *overrides, *frozen, f"ckpt={tmp_path / CKPT}")
        assert "values" in run(again, tmp_path / "again")  # the first run's might have been
