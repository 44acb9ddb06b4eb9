"""OGBench data: semantics of terminals, masks and rewards; every kind of wrong file is named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ogbench
import pytest
import torch
from hydra.utils import instantiate

from deflow.data.memory.transitions import ACTION_BOUND
from deflow.data.sources import ogbench as module
from deflow.data.sources.ogbench import OGBenchSource
from deflow.envs import ogbench as envs
from deflow.envs.rendering import off_screen
from deflow.errors import UserError
from deflow.types import Lookahead
from tests.conftest import EPISODES, STEPS, tiny_config

ENVIRONMENTS = [
    ("pointmaze-medium", "navigate"),
    ("antmaze-medium", "navigate"),
    ("humanoidmaze-medium", "navigate"),
    ("antsoccer-arena", "navigate"),
    ("cube-single", "play"),
    ("cube-double", "play"),
    ("scene", "play"),
    ("puzzle-3x3", "play"),
]


def source(folder: Path, *overrides: str) -> OGBenchSource:
    config = tiny_config(folder, "experiment=pointmaze", "data.source.download=false", *overrides)
    return instantiate(config.data.source)


@pytest.fixture
def copied(point_data: Path, tmp_path: Path) -> Path:
    for file in point_data.glob("pointmaze-medium-navigate-v0*.npz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **arrays: np.ndarray | None) -> None:
    path = folder / "pointmaze-medium-navigate-v0.npz"
    content = dict(np.load(path)) | arrays
    np.savez(path, **{key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize("env,dataset", ENVIRONMENTS)
def test_equals_plain_ogbench(env: str, dataset: str, tiny_data: Callable[[str, str], Path]) -> None:
    folder = tiny_data(env, dataset)
    ours, _ = source(folder, f"task.env={env}", f"task.dataset={dataset}").load()
    name = f"{env}-{dataset}-singletask-v0"
    _, theirs, _ = ogbench.make_env_and_datasets(name, dataset_path=str(folder / f"{env}-{dataset}-v0.npz"))
    batch, _ = ours.batch(ours.starts, Lookahead(discount=1.0))
    assert len(ours) == EPISODES * (STEPS - 1)
    for key in ("observations", "rewards", "next_observations"):
        assert torch.equal(getattr(batch, key), torch.from_numpy(theirs[key])), key
    assert torch.equal(batch.discounts, torch.from_numpy(theirs["masks"]))
    torch.testing.assert_close(batch.actions, torch.from_numpy(theirs["actions"]).clamp(-ACTION_BOUND, ACTION_BOUND))
    in_file = torch.from_numpy(
        np.load(folder / f"{env}-{dataset}-v0.npz")["actions"]
    )  # also of a trajectory's last state
    torch.testing.assert_close(batch.next_actions, in_file[ours.starts + 1].clamp(-ACTION_BOUND, ACTION_BOUND))


def test_no_transition_crosses_the_end_of_a_trajectory(point_data: Path) -> None:
    transitions, _ = source(point_data).load()
    terminals = np.load(point_data / "pointmaze-medium-navigate-v0.npz")["terminals"]
    assert not terminals[transitions.starts.numpy()].any()


def test_a_time_limit_is_no_end_of_the_task(point_data: Path) -> None:
    # Random walks of 40 steps never reach the goal: every trajectory ends, no mask is 0.
    transitions, _ = source(point_data).load()
    assert transitions.masks.min() == 1
    assert transitions.rewards.max() == -1


def test_masks_are_zero_where_the_goal_is_reached(copied: Path) -> None:
    task = source(copied)
    env = ogbench.make_env_and_datasets("pointmaze-medium-navigate-singletask-v0", env_only=True)
    env.reset()
    qpos = np.load(copied / "pointmaze-medium-navigate-v0.npz")["qpos"].copy()
    qpos[5] = env.unwrapped.cur_goal_xy
    change(copied, qpos=qpos)
    transitions, _ = task.load()
    assert transitions.masks[5] == 0
    assert transitions.rewards[5] == 0
    assert transitions.masks.sum() == len(transitions.masks) - 1


def test_truncated(copied: Path) -> None:
    path = copied / "pointmaze-medium-navigate-v0.npz"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated"):
        source(copied).load()


def test_not_ogbench(copied: Path) -> None:
    change(copied, qpos=None, terminals=None)
    with pytest.raises(UserError, match="lacks terminals, qpos"):
        source(copied).load()


def test_other_environment(copied: Path) -> None:
    with pytest.raises(UserError, match="another environment than cube-single"):
        source(
            copied,
            "task.env=cube-single",
            "task.dataset=play",
            f"data.source.path={copied}/pointmaze-medium-navigate-v0.npz",
        ).load()


def test_nan(copied: Path) -> None:
    observations = np.load(copied / "pointmaze-medium-navigate-v0.npz")["observations"].copy()
    observations[3, 0] = np.nan
    change(copied, observations=observations)
    with pytest.raises(UserError, match="'observations' has NaN or infinite values in 1 rows"):
        source(copied).load()


def test_actions_outside_are_clipped_with_a_warning(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    actions = np.load(copied / "pointmaze-medium-navigate-v0.npz")["actions"].copy()
    actions[7] = 3.0
    change(copied, actions=actions)
    transitions, _ = source(copied).load()
    assert transitions.decisions(transitions.starts).abs().max() <= ACTION_BOUND
    assert "1 rows have actions outside what a policy decides" in caplog.text


def test_missing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="generate_if_missing=true"):
        source(tmp_path).prepare()
    with pytest.raises(UserError, match="no file"):
        source(tmp_path, "data.source.path=nowhere.npz").prepare()


def test_no_network_says_where_to_put_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deflow.data.sources.download.time.sleep", lambda _: None)
    offline = source(tmp_path, "data.source.download=true", "data.source.url=http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no connection to the server\. Put pointmaze-medium-navigate-v0.npz"):
        offline.prepare()


NAME = "pointmaze-medium-navigate-v0"


@pytest.fixture
def downloads(point_data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files downloaded, from a server that is always there."""
    names: list[str] = []

    def fetch(url: str, path: Path) -> None:
        names.append(path.name)
        path.write_bytes((point_data / path.name).read_bytes())

    monkeypatch.setattr(module, "download", fetch)
    return names


def spoil(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "of another kind":
        np.savez(path, observations=np.zeros((4, 2)))
    else:  # a byte of a column, which only its checksum shows
        content = bytearray(path.read_bytes())
        content[2000] ^= 255
        path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["", "-val"])
@pytest.mark.parametrize("how", ["cut", "of another kind", "a wrong byte"])
def test_a_downloaded_file_of_no_use_is_had_again(
    how: str, suffix: str, copied: Path, downloads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = copied / f"{NAME}{suffix}.npz"
    whole = path.read_bytes()
    spoil(path, how)
    spoilt = path.read_bytes()
    source(copied, "data.source.download=true").load()
    assert downloads == [path.name]
    assert path.read_bytes() == whole
    assert (copied / f"{path.name}.damaged").read_bytes() == spoilt
    assert f"renamed to {path.name}.damaged" in caplog.text


def test_it_is_had_again_only_once(copied: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, path: Path) -> None:
        downloads.append(path.name)
        path.write_bytes(b"nonsense")

    monkeypatch.setattr(module, "download", fetch)
    spoil(copied / f"{NAME}.npz", "cut")
    with pytest.raises(UserError, match="truncated"):
        source(copied, "data.source.download=true").load()
    assert downloads == [f"{NAME}.npz"]


def test_what_another_process_has_had_again_is_read(
    copied: Path, downloads: list[str], point_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied / f"{NAME}.npz"
    spoil(path, "cut")

    @contextmanager
    def other_process_first(lock: Path, purpose: str) -> Iterator[None]:
        path.write_bytes((point_data / path.name).read_bytes())
        yield

    monkeypatch.setattr(module, "locked", other_process_first)
    source(copied, "data.source.download=true").load()
    assert downloads == []
    assert not list(copied.glob("*.damaged"))


@pytest.mark.parametrize("settings", [("data.source.download=false",), ("data.source.path={path}",)])
def test_the_users_own_file_stays_where_it_is(settings: tuple[str], copied: Path, downloads: list[str]) -> None:
    path = copied / f"{NAME}.npz"
    spoil(path, "cut")
    with pytest.raises(UserError, match="truncated"):
        source(copied, "data.source.download=true", *(s.format(path=path) for s in settings)).load()
    assert path.exists()
    assert downloads == []


def test_a_damaged_generated_file_is_generated_again(tmp_path: Path) -> None:
    made = source(tmp_path, "data.source.generate_if_missing=true", "data.source.generate_episodes=1")
    made.prepare()
    path = Path(made.provenance()["path"])
    spoil(path, "cut")
    assert len(made.load()[0]) == 1000
    assert (path.with_name(f"{NAME}.npz.damaged")).exists()


@pytest.mark.parametrize("card", ['{"generated_by": "deflow", "bytes": 5}', '{"generated_by": "deflow"}', "{", "[1]"])
def test_a_card_of_another_file_is_not_believed(card: str, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied / f"{NAME}.json").write_text(card)
    provenance = source(copied).provenance()
    assert provenance["generated"] is False
    assert set(provenance) == {"name", "path", "bytes", "generated"}
    assert "not believed" in caplog.text


def test_generated_data_says_so_and_keeps_apart(tmp_path: Path) -> None:
    made = source(tmp_path, "data.source.generate_if_missing=true", "data.source.generate_episodes=1")
    made.prepare()
    assert made.provenance()["generated"]
    assert not list(tmp_path.glob("*.npz"))
    Path(made.provenance()["path"]).with_suffix(".json").unlink()
    assert made.provenance()["generated"]
    transitions, _ = made.load()
    assert len(transitions) == 1000


def test_wrong_task_id() -> None:
    with pytest.raises(UserError, match="1 to 5"):
        _ = source(Path("."), "task_id=6").task


def test_a_missing_validation_file_is_what_is_missing(copied: Path) -> None:
    name = "pointmaze-medium-navigate-v0"
    (copied / f"{name}-val.npz").unlink()
    says = f"{name}.npz is there, but its validation file {name}-val.npz is not beside it"
    with pytest.raises(UserError, match=says):
        source(copied).prepare()
    with pytest.raises(UserError, match=says):
        source(copied, f"data.source.path={copied / f'{name}.npz'}").prepare()
    with pytest.raises(UserError, match=says):
        source(copied, f"data.source.path={copied}").prepare()


def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"paths.data: .*file is not a folder"):
        source(tmp_path / "file", "data.source.generate_if_missing=true").prepare()


def test_a_renderer_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setitem(sys.modules, "mujoco", None)  # its import fails
    with pytest.raises(UserError, match=r"MUJOCO_GL=osmesa does not work here .* egl, glfw or disabled"):
        envs.make_env("pointmaze-medium-navigate-v0")


def test_a_renderer_without_opengl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyOpenGL raises where EGL's library is there and OpenGL's is not."""
    (tmp_path / "mujoco.py").write_text("import ctypes\nraise ctypes.ArgumentError('no glGetError')\n")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    with pytest.raises(UserError, match=r"MUJOCO_GL=egl does not work here \(no glGetError\)"):
        envs.make_env("pointmaze-medium-navigate-v0")


@pytest.mark.parametrize(
    "libraries, chosen",
    [({"EGL", "OpenGL"}, "egl"), ({"EGL", "GL"}, "egl"), ({"EGL"}, "disabled"), ({"GL", "OpenGL"}, "disabled")],
)
def test_egl_is_chosen_where_opengl_is_beside_it(
    libraries: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    assert off_screen() == chosen


def test_another_maze_is_noticed(copied: Path) -> None:
    columns = np.load(copied / "pointmaze-medium-navigate-v0.npz")
    elsewhere = columns["observations"] + [0, 4]  # a cell further up
    change(copied, observations=elsewhere, qpos=elsewhere)
    with pytest.raises(UserError, match=r"is of another maze than pointmaze-medium-\S+: \d+% of its"):
        source(copied).load()
