"""Every experiment and every choice of a component, composed from the real files and run once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deflow.command_line import choices
from deflow.data.sources.d4rl import REFERENCE_RETURNS
from deflow.pipeline import train
from tests.conftest import compose_config, tiny_config, write_d4rl

EXPERIMENTS = choices("experiment")
OTHER_DATA = ["custom", "minari"]  # tests/data/sources/test_source.py
VISUAL = [name for name in EXPERIMENTS if name.startswith("visual_")]  # one of them runs in tests/test_images.py
D4RL = [name for name in EXPERIMENTS if name.endswith(("-v1", "-v2"))]

# tasks.md of the papers: discount, aggregate, delta.
PAPER = {
    "antmaze": (0.99, "min", 0.01),
    "antmaze_giant": (0.995, "min", 0.01),
    "humanoidmaze_medium": (0.995, "mean", 0.001),
    "humanoidmaze_large": (0.995, "mean", 0.001),
    "antsoccer_arena": (0.995, "mean", 0.01),
    "cube_single": (0.99, "mean", 0.001),
    "cube_double": (0.99, "mean", 0.001),
    "scene": (0.99, "mean", 0.001),
    "puzzle_3x3": (0.99, "mean", 0.005),
    "puzzle_4x4": (0.99, "mean", 0.005),
}


def test_the_papers_73_tasks_are_there() -> None:
    tasks = set(choices("task"))
    states = {"antmaze_large", *PAPER} - {"antmaze"}
    assert states | {*VISUAL, *D4RL} <= tasks
    assert 5 * len(states) + len(VISUAL) + len(D4RL) == 73  # five goals in each environment with states


@pytest.mark.parametrize("experiment", PAPER)
def test_the_papers_settings(experiment: str) -> None:
    config = compose_config(f"experiment={experiment}")
    critic = config.agent.critic
    assert (config.data.discount, critic.aggregate, config.agent.trust_region) == PAPER[experiment]
    assert list(config.networks.hidden) == [512] * 4
    assert (config.data.batch_size, config.agent.optimizer.lr, critic.tau) == (256, 3e-4, 0.005)
    assert (config.updates, config.eval.every, config.eval.episodes) == (1_000_000, 100_000, 50)


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("experiment", sorted({*EXPERIMENTS} - {*D4RL, *VISUAL, *OTHER_DATA}))
def test_every_experiment_runs(experiment: str, tiny_data: Callable[[str, str], Path], tmp_path: Path) -> None:
    task = compose_config(f"experiment={experiment}").task
    data = tiny_data(task.env, task.dataset)
    overrides = (f"experiment={experiment}", "data.source.path=null", "data.source.download=true")
    few = ("eval.episodes=1", "eval.num_envs=1", "trainer.log_every_n_steps=1")
    config = tiny_config(data, *overrides, *few)
    for stage in config.stages.values():
        stage.steps = 1
    train(config, tmp_path)
    assert (tmp_path / "summary.json").exists()


# tasks.md of the papers: delta of DeFlow, alpha of FQL.
PAPER_VISUAL = {
    "visual_cube_single": (0.001, 300),
    "visual_cube_double": (0.001, 100),
    "visual_scene": (0.001, 100),
    "visual_puzzle_3x3": (0.0005, 300),
    "visual_puzzle_4x4": (0.0005, 300),
}


@pytest.mark.parametrize("experiment", VISUAL)
def test_the_papers_settings_for_images(experiment: str) -> None:
    config, fql = compose_config(f"experiment={experiment}"), compose_config(f"experiment={experiment}", "agent=fql")
    assert (config.agent.trust_region, fql.agent.actor.alpha) == PAPER_VISUAL[experiment]
    assert (config.task_id, config.updates, config.agent.critic.aggregate) == (1, 500_000, "mean")
    assert (config.data.source.frames, config.data.crop_probability) == (3, 0.5)
    assert config.agent.critic.encoder == {"stacks": [16, 32, 32], "blocks": 1, "features": 512}


@pytest.mark.parametrize("experiment", D4RL)
def test_the_papers_settings_for_d4rl(experiment: str) -> None:
    config = compose_config(f"experiment={experiment}")
    robot = experiment.split("-")[0]
    expected = {"antmaze": ("mean", 0.015), "pen": ("min", 0.01)}.get(robot, ("min", 0.001))
    assert (config.agent.critic.aggregate, config.agent.trust_region) == expected
    assert (config.task.dataset, config.updates) == (experiment, 500_000)


@pytest.mark.parametrize("experiment", ["antmaze-umaze-v2", "pen-human-v1"])
def test_d4rl_experiments_run(experiment: str, tmp_path: Path) -> None:
    path = write_d4rl(tmp_path / f"{experiment}.hdf5", experiment.split("-")[0])
    overrides = (f"experiment={experiment}", f"data.source.path={path}", "updates=2", "eval.every=2", "eval.episodes=1")
    summary = train(tiny_config(tmp_path, *overrides), tmp_path / "run")
    assert "rebuilt on MuJoCo" in summary["protocol"]
    low, high = REFERENCE_RETURNS[experiment.split("-")[0]]
    score = 100 * (summary["eval/return"]["last"] - low) / (high - low)
    assert summary["eval/score"]["last"] == pytest.approx(score)


# tasks.md of the papers: alpha of FQL, delta of DeFlow.
ONLINE = {
    "humanoidmaze_medium": (100, 0.001),
    "antsoccer_arena": (30, 0.01),
    "cube_double": (300, 0.001),
    "scene": (300, 0.001),
    "puzzle_4x4": (1000, 0.005),
    "antmaze-umaze-v2": (10, 0.015),
    "antmaze-umaze-diverse-v2": (10, 0.015),
    "antmaze-medium-play-v2": (10, 0.015),
    "antmaze-medium-diverse-v2": (10, 0.015),
    "antmaze-large-play-v2": (3, 0.015),
    "antmaze-large-diverse-v2": (3, 0.015),
    "pen-cloned-v1": (1000, 0.01),
    "door-cloned-v1": (1000, 0.001),
    "hammer-cloned-v1": (1000, 0.001),
    "relocate-cloned-v1": (10000, 0.001),
}


def test_the_papers_offline_to_online_tasks() -> None:
    assert set(choices("experiment/online")) == set(ONLINE)


@pytest.mark.parametrize("task", ONLINE)
def test_the_papers_settings_offline_to_online(task: str) -> None:
    fql = compose_config(f"experiment=online/{task}", "agent=fql")
    deflow = compose_config(f"experiment=online/{task}")
    assert (fql.agent.actor.alpha, deflow.agent.trust_region) == ONLINE[task]
    offline = compose_config(f"task={task}", "task.updates=1_000_000")  # the one change, of D4RL's tasks
    assert (deflow.task, deflow.agent, deflow.data) == (offline.task, offline.agent, offline.data)
    asked = compose_config(f"task={task}", "stages=offline_to_online", "agent=fql", f"name=online/{task}")
    assert asked == fql
    steps = {name: (stage.steps, "environment" in stage) for name, stage in deflow.stages.items()}
    assert steps == {"joint": (1_000_000, False), "online": (1_000_000, True)}


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize(
    "override",
    [
        *(f"solver={name}" for name in choices("solver")),
        "stages=staged",
        "stages.joint.train=[behavior_flow]",
        "task_id=3",
        "agent.critic.aggregate=min",
        "agent.refiner.lagrange=false",
        "agent.refiner.objective=gradient_step",
        "agent/critic=flow",
        "agent/critic=occupancy",
        "agent.horizon=3",
        "networks.activation=gelu_tanh",
    ],
)
def test_every_component_swaps_by_an_override(override: str, point_data: Path, tmp_path: Path) -> None:
    summary = train(tiny_config(point_data, "experiment=pointmaze", override), tmp_path)
    assert summary["evaluations"] >= 1
