"""D4RL's antmaze, number by number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from deflow.data.sources.d4rl import D4RLSource

GOALS = {"umaze": (0, 8), "medium-play": (20, 20), "large-diverse": (32, 24)}  # centres of their cells


def source(maze: str = "umaze") -> D4RLSource:
    return D4RLSource(f"antmaze-{maze}-v2", None, "", None)


@pytest.fixture
def env() -> Iterator[gymnasium.Env]:
    env = source().make_env()
    env.reset(seed=0)
    yield env
    env.close()


def raw(env: gymnasium.Env) -> Any:
    return env.unwrapped


def test_an_action_takes_a_tenth_of_a_second(env: gymnasium.Env) -> None:
    before = raw(env).data.time
    env.step(np.zeros(8))
    assert raw(env).data.time - before == pytest.approx(0.1)
    assert raw(env).model.opt.timestep == 0.02
    assert raw(env).model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4


@pytest.mark.parametrize(("action", "torque"), [(1.0, 30.0), (-0.5, -15.0), (2.0, 30.0)])
def test_motors_have_30_newton_metres(action: float, torque: float, env: gymnasium.Env) -> None:
    env.step(np.full(8, action))
    assert raw(env).data.qfrc_actuator[6:] == pytest.approx(np.full(8, torque))
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (8,))


def test_contacts_are_as_soft_as_d4rls(env: gymnasium.Env) -> None:
    assert np.allclose(raw(env).model.geom_solimp[:, :3], (0.8, 0.8, 0.01))


@pytest.mark.parametrize(("maze", "walls"), [("umaze", 18), ("medium-play", 38), ("large-diverse", 62)])
def test_walls_are_blocks_of_4_metres_around_the_start(maze: str, walls: int) -> None:
    env = source(maze).make_env()
    model = raw(env).model
    blocks = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    centres = {tuple(position) for position in model.geom_pos[blocks]}
    assert len(centres) == walls
    assert {(-4, -4, 1), (0, -4, 1), (-4, 0, 1)} <= centres
    assert not {(0, 0, 1), (*GOALS[maze], 1)} & centres
    assert ((0, 4, 1) in centres, (8, 4, 1) in centres) == (maze == "umaze", maze != "umaze")  # y is up the rows
    assert np.array_equal(np.unique(model.geom_size[blocks], axis=0), [[2, 2, 1]])
    env.close()


@pytest.mark.parametrize("maze", GOALS)
def test_starts_and_goals_are_drawn_as_in_d4rl(maze: str) -> None:
    env = source(maze).make_env()
    resets = [(env.reset(seed=seed)[0], raw(env).goal) for seed in range(300)]
    states, goals = (np.array(column) for column in zip(*resets, strict=True))
    positions, velocities = states[:, :15], states[:, 15:]
    assert np.allclose(np.linalg.norm(positions[:, 3:7], axis=1), 1)  # a rotation
    offsets = np.delete(positions - raw(env).init_qpos, range(3, 7), axis=1)
    assert 0.095 < np.abs(offsets).max() <= 0.1
    assert np.allclose(velocities.std(axis=0), 0.1, atol=0.015)
    assert raw(env).init_qpos[:3].tolist() == [0, 0, 0.75]
    away = goals - GOALS[maze]
    assert away.min() >= 0
    assert 1.3 < away.max() <= 1.5
    assert np.allclose(away.mean(axis=0), 0.75, atol=0.08)  # a uniform one of width 1 and one of 0.5
    env.close()


def test_an_observation_is_positions_and_velocities(env: gymnasium.Env) -> None:
    observation = env.step(np.ones(8))[0]
    assert observation in env.observation_space
    assert np.array_equal(observation, np.concatenate([raw(env).data.qpos, raw(env).data.qvel]))


@pytest.mark.parametrize(("distance", "reached"), [(0.499, True), (0.501, False)])
def test_half_a_metre_from_the_goal_ends_the_episode_as_the_data_label_it(distance: float, reached: bool) -> None:
    env = source().make_env()
    env.reset(seed=0)
    there = env.step(np.ones(8))[0][:2]
    env.reset(seed=0)
    raw(env).goal = there + np.array([distance * 0.6, distance * 0.8])
    _, reward, terminated, truncated, info = env.step(np.ones(8))
    assert (reward, terminated, truncated, info["success"]) == (float(reached), reached, False, reached)
    assert source().label(float(reward)) == (0 if reached else -1)  # test_d4rl.py: and so are the data's
    env.close()


def test_a_fall_ends_nothing(env: gymnasium.Env) -> None:
    data = raw(env).data
    data.qpos[2:7] = [0.1, 0, 1, 0, 0]  # on its back, below the height at which Gymnasium's ant has fallen
    assert not env.step(np.zeros(8))[2]


@pytest.mark.parametrize(("maze", "steps"), [("umaze-diverse", 700), ("medium-play", 1000), ("large-play", 1000)])
def test_episodes_are_cut(maze: str, steps: int) -> None:
    env = source(maze).make_env()
    env.reset(seed=0)
    ends = [env.step(np.zeros(8))[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]
    env.close()
