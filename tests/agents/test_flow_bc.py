"""Flow behaviour cloning: the shared checks, and a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate

from deflow.pipeline import train
from deflow.types import Spec
from tests.agents.tester import check_agent
from tests.conftest import compose_config, tiny_config


def test_shared_checks() -> None:
    config = compose_config("experiment=cube_single", "agent=flow_bc", "networks.hidden=[16,16]")
    check_agent(instantiate(config.agent, _partial_=True)(spec=Spec(5, 3)))


@pytest.mark.usefixtures("short_episodes")
def test_a_run(point_data: Path, tmp_path: Path) -> None:
    summary = train(tiny_config(point_data, "experiment=pointmaze", "agent=flow_bc"), tmp_path)
    assert summary["agent"] == "FlowBC"
    assert summary["evaluations"] == 2
