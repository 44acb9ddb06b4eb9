"""Generated data: OGBench's format, the same whatever the number of processes, and OGBench can read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ogbench
import pytest
from safetensors.numpy import load_file

from deflow.data.generate import runner
from deflow.data.generate.ant import ASSET
from deflow.data.generate.expert import train_expert
from deflow.data.generate.maze import MazeCollector, follow_direction
from deflow.data.generate.runner import generate_dataset
from deflow.envs.ogbench import make_env
from deflow.errors import UserError

SIZES = {  # observation, action, qpos, qvel
    "pointmaze-medium-navigate-v0": (2, 2, 2, 2),
    "pointmaze-large-stitch-v0": (2, 2, 2, 2),
    "antmaze-giant-navigate-v0": (29, 8, 15, 14),
    "antmaze-teleport-explore-v0": (29, 8, 15, 14),
    "cube-single-play-v0": (28, 5, 21, 20),
    "cube-double-noisy-v0": (37, 5, 28, 26),
    "scene-play-v0": (40, 5, 25, 24),
    "puzzle-3x3-noisy-v0": (55, 5, 23, 23),
}


@pytest.mark.parametrize("name", SIZES)
def test_format(name: str, tmp_path: Path) -> None:
    path = generate_dataset(name, 2, tmp_path, seed=0, workers=1, steps=60)
    train, val = (dict(np.load(file)) for file in (path, tmp_path / f"{name}-val.npz"))
    keys = ["observations", "actions", "qpos", "qvel"]
    extra = ["button_states"] if name.startswith(("scene", "puzzle")) else []
    for arrays, episodes in ((train, 2), (val, 1)):
        assert set(arrays) == {*keys, "terminals", *extra}
        assert tuple(arrays[key].shape[1] for key in keys) == SIZES[name]
        assert all(arrays[key].dtype == np.float32 for key in keys)
        assert arrays["terminals"].dtype == bool
        assert list(np.flatnonzero(arrays["terminals"])) == [60 * i + 59 for i in range(episodes)]
        assert np.abs(arrays["actions"]).max() <= 1
    if extra:
        assert train["button_states"].dtype == np.int64
    env = name.removesuffix("-v0")
    _, theirs, _ = ogbench.make_env_and_datasets(f"{env}-singletask-v0", dataset_path=str(path))
    assert len(theirs["rewards"]) == 2 * 59


@pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disabled", reason="no off-screen rendering here")
def test_images(tmp_path: Path) -> None:
    images, states = (
        dict(np.load(generate_dataset(name, 1, tmp_path, seed=3, workers=1, steps=3)))
        for name in ("visual-cube-single-play-v0", "cube-single-play-v0")
    )
    assert images["observations"].shape == (3, 64, 64, 3)
    assert images["observations"].dtype == np.uint8
    assert images["observations"].std() > 10
    assert images["qpos"].shape == states["qpos"].shape


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    files = [
        generate_dataset("cube-single-play-v0", 3, tmp_path / str(workers), seed=5, workers=workers, steps=80)
        for workers in (1, 2)
    ]
    one, two = (dict(np.load(file)) for file in files)
    for key in one:
        assert np.array_equal(one[key], two[key]), key


def test_the_seed_changes_everything(tmp_path: Path) -> None:
    name = "pointmaze-medium-navigate-v0"
    actions = [np.load(generate_dataset(name, 1, tmp_path / str(s), s, 1, 50))["actions"] for s in (0, 1)]
    assert not np.array_equal(*actions)


def test_pointmaze_statistics(tmp_path: Path) -> None:
    # The expert's unit direction (mean square 1/2 a dimension) plus noise 0.5, clipped: the reference sets have 0.70.
    path = generate_dataset("pointmaze-medium-navigate-v0", 2, tmp_path, seed=0, workers=1)
    actions = np.load(path)["actions"]
    assert actions.shape == (2002, 2)
    assert actions.std(0) == pytest.approx([0.70, 0.70], abs=0.05)


def test_the_ant_walks_to_the_next_cell(tmp_path: Path) -> None:
    # The card of the shipped policy says 0.15 m a step; the noise, the turns and the start cost some of it. Action
    # statistics: those of 250 reference episodes are 0.64 to 0.75.
    name = "antmaze-medium-navigate-v0"
    data = np.load(generate_dataset(name, 2, tmp_path, seed=1, workers=1, steps=400))
    steps = np.linalg.norm(np.diff(data["qpos"][:400, :2], axis=0), axis=1)
    assert 0.08 < steps.mean() < 0.2
    assert data["actions"].std(0) == pytest.approx([0.7] * 8, abs=0.1)


def test_an_expert_can_be_trained_anew(tmp_path: Path) -> None:
    # 200 steps teach nothing: this is about the way from stable-baselines3's weights to ours and about the measurement.
    # The shipped policy walks 0.04 to 0.17 m a step, by episode.
    out = tmp_path / "expert.safetensors"
    speeds = train_expert(steps=200, out=out, seed=0, episodes=2)
    assert speeds["shipped"][0] > 0.04
    assert abs(speeds["trained"][0]) < 0.02
    assert {name: array.shape for name, array in load_file(out).items()} == {
        name: array.shape for name, array in load_file(str(ASSET)).items()
    }
    with pytest.raises(UserError, match=r"holds expert\.safetensors: .* overwrite=true"):
        train_expert(steps=200, out=out, seed=0, episodes=2)


def test_explore_keeps_a_direction_for_ten_steps() -> None:
    env = make_env("pointmaze-medium-navigate-v0", terminate_at_goal=False)
    collector = MazeCollector(env, "explore", follow_direction, noise=0.0)
    rng = np.random.default_rng(0)
    observation, info = collector.reset(rng, 0)
    directions = []
    for _ in range(30):
        collector.act(observation, info, rng)
        directions.append(tuple(collector.direction))
    assert [len(set(directions[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1]
    assert len(set(directions)) == 3
    env.close()


@pytest.mark.parametrize(
    "name",
    [
        "humanoidmaze-medium-navigate-v0",
        "cube-single-navigate-v0",
        "nonsense",
        "cube-single-play",
        "visual-antmaze-medium-navigate-v0",
    ],
)
def test_no_recipe(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot generate"):
        generate_dataset(name, 1, tmp_path)


def test_no_such_environment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no environment for 'antmaze-tiny-navigate-v0'"):
        generate_dataset("antmaze-tiny-navigate-v0", 1, tmp_path)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("deflow.data.generate.runner.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="no space"):
        generate_dataset("pointmaze-medium-navigate-v0", 1, tmp_path / "new")
    assert not list(tmp_path.iterdir())


NAME = "pointmaze-medium-navigate-v0"


def generate(out: Path, seed: int = 0, overwrite: bool = False) -> Path:
    return generate_dataset(NAME, 1, out, seed, workers=1, steps=5, overwrite=overwrite)


@pytest.mark.parametrize("file", [f"{NAME}.npz", f"{NAME}-val.npz", f"{NAME}.json"])
def test_nothing_is_replaced_unless_asked_for(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / file).write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_collect_all", lambda *_: pytest.fail("worked for nothing"))
        with pytest.raises(UserError, match=f"holds {file}: choose another out=, or say overwrite=true"):
            generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "precious"
    path = generate(tmp_path, overwrite=True)
    assert runner.read_card(path)["episodes"] == 1


def test_a_set_made_meanwhile_by_another_process_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def other_process_first(lock: Path, purpose: str) -> Iterator[None]:
        (tmp_path / f"{NAME}.npz").write_text("precious")
        yield

    monkeypatch.setattr(runner, "locked", other_process_first)
    with pytest.raises(UserError, match="overwrite=true"):
        generate(tmp_path)


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("renames", range(3))
def test_a_set_that_was_killed_while_it_appeared_is_no_set(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = generate(tmp_path)
    done = []

    def replace_or_die(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise Killed
        done.append(target.name)
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("deflow.files.os.replace", replace_or_die)
        with pytest.raises(Killed):
            generate(tmp_path, seed=1, overwrite=True)
    assert not old.exists()
    assert f"{NAME}.npz" not in done


def test_a_failure_keeps_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = generate(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(runner.np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path, seed=1, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert runner.read_card(path)
