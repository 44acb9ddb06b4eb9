"""Minari's data sets, made on the spot."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer


def episode(number: int, observations: Any, actions: Any, rewards: Any, terminations: Any) -> EpisodeBuffer:
    """One that was cut at its end unless it ended there.

    Args:
        number: of the episode.
        observations: array of a row more than there are steps, or a dictionary of such.
        actions: a row a step.
        rewards: likewise.
        terminations: likewise.
    """
    ends = np.arange(len(actions)) == len(actions) - 1
    return EpisodeBuffer(
        id=number,
        observations=observations,
        actions=np.array(actions),
        rewards=np.array(rewards, float),
        terminations=np.array(terminations, bool),
        truncations=ends & ~np.array(terminations, bool),
    )


def write_set(
    episodes: Sequence[EpisodeBuffer], env: gymnasium.Env | None = None, name: str = "test/own-v0", **more: Any
) -> str:
    """Make the data set `name`, in the place of one that is there, and give its name back."""
    if name in minari.list_local_datasets():
        minari.delete_dataset(name)
    described = {key: "tests" for key in ("algorithm_name", "author", "author_email", "code_permalink", "description")}
    settings = {"eval_env": None if env is None else env.spec, "requirements": [], **described, **more}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*env.* is (set to )?None")
        minari.create_dataset_from_buffers(name, buffer=list(episodes), env=env, **settings)
    return name
