"""The video shows whole episodes, where the machine can render at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import pytest

from deflow.build import build_agent
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.evaluation.video import record_video
from deflow.policy import Policy
from tests.conftest import compose_config

TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def test_one_frame_a_state(tmp_path: Path) -> None:
    def make_env(**kwargs: Any) -> Any:
        return ogbench.make_env(TASK, max_episode_steps=5, **kwargs)

    config = compose_config("experiment=pointmaze", "networks.hidden=[8]")
    policy = Policy(build_agent(config.agent, ogbench.spec_of(make_env())))
    try:
        record_video(make_env, policy, tmp_path / "video.mp4", episodes=2, seed=0)
    except UserError as error:
        pytest.skip(str(error))
    frames = imageio.mimread(tmp_path / "video.mp4")
    assert len(frames) == 2 * 6
    assert frames[0].std() > 10  # a picture, not a blank
    assert frames[0].shape == (256, 256, 3)
