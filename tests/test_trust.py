"""Code that files name as environments: gymnasium's own and its kin's, or a trusted package's, and no other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import pytest

from deflow.errors import UserError
from deflow.trust import check_environment_id, check_environment_spec, is_trusted, trust_only


@pytest.fixture(autouse=True)
def _nobody_is_trusted() -> Iterator[None]:
    trust_only(())
    yield
    trust_only(())


def test_whoever_is_trusted_is_trusted_below_and_until_the_next_command() -> None:
    trust_only(["mylab", "other.envs"])
    assert [is_trusted(name) for name in ("mylab", "mylab.agents.Mine", "other.envs.x")] == [True] * 3
    assert [is_trusted(name) for name in ("mylabs.agents", "other", "my")] == [False] * 3
    trust_only(["other"])
    assert not is_trusted("mylab")


def test_one_package_needs_no_list() -> None:
    trust_only("mylab")
    assert is_trusted("mylab.agents")


@pytest.mark.parametrize("packages", [["my lab"], [""], [3], ["mylab."], ["./mylab"]])
def test_what_is_no_package_is_refused(packages: list) -> None:
    with pytest.raises(UserError, match=r"trust= takes names of packages, as in trust=\[mylab\]"):
        trust_only(packages)


@pytest.mark.parametrize("name", ["Pendulum-v1", "gymnasium:Pendulum-v1", "gymnasium_robotics:AntMaze_UMaze-v5", ""])
def test_known_environments(name: str) -> None:
    check_environment_id(name, "run.yaml: env")


def test_an_id_that_imports_a_module() -> None:
    with pytest.raises(UserError, match=r"run.yaml: env names code of 'own_envs', own_envs:Name-v0"):
        check_environment_id("own_envs:Name-v0", "run.yaml: env")
    trust_only(["own_envs"])
    check_environment_id("own_envs:Name-v0", "run.yaml: env")


def spec(**changes: object) -> dict:
    env = gymnasium.make("Pendulum-v1")
    stored = json.loads(env.spec.to_json())  # type: ignore[union-attr]
    env.close()
    return stored | changes


WRAPPER = {"name": "Wrapper", "entry_point": "gymnasium.wrappers.common:TimeLimit", "kwargs": {"max_episode_steps": 3}}


def test_stored_environments_that_are_known() -> None:
    check_environment_spec(json.dumps(spec(additional_wrappers=[WRAPPER])), "metadata.json")


@pytest.mark.parametrize(
    "entry_point",
    [
        "os:system",
        "gymnasium.envs.registration:make",
        "gymnasium.envs.registration:importlib",
        "own_envs.pendulum:Mine",
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        lambda entry_point: spec(entry_point=entry_point),
        lambda entry_point: spec(additional_wrappers=[WRAPPER, WRAPPER | {"entry_point": entry_point}]),
    ],
)
def test_stored_environments_that_call_something_else(place: Callable[[str], dict], entry_point: str) -> None:
    with pytest.raises(UserError, match=f"metadata.json names {entry_point}, which is no known environment"):
        check_environment_spec(json.dumps(place(entry_point)), "metadata.json")
    assert "own_envs" not in sys.modules


def test_a_trusted_package_has_environments_of_its_own() -> None:
    trust_only(["own_envs"])
    check_environment_spec(json.dumps(spec(entry_point="own_envs.pendulum:Mine")), "metadata.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 200_000, '{"additional_wrappers": 3, "entry_point": null}'])
def test_what_describes_no_environment(text: str) -> None:
    with pytest.raises(UserError, match=r"metadata.json does not describe an environment"):
        check_environment_spec(text, "metadata.json")


def test_a_minari_data_set_runs_nothing_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deflow.data.sources.minari import MinariSource

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder = tmp_path / "test" / "evil-v0" / "data"
    folder.mkdir(parents=True)
    evil = spec(entry_point="os:system", kwargs={"command": f"touch {tmp_path}/ran"})
    # Without spaces in the metadata the library makes an environment to see its.
    (folder / "metadata.json").write_text(json.dumps({"env_spec": json.dumps(evil), "data_format": "hdf5"}))
    with pytest.raises(UserError, match=r"metadata.json: env_spec names os:system"):
        MinariSource("test/evil-v0", download=False).prepare()
    assert not (tmp_path / "ran").exists()
