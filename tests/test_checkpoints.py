"""Checkpoints whose content is not one: one line that says so, whatever command reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deflow.checkpoints import FORMAT, OF_A_STAGE, TO_RESUME, agent_of, load_checkpoint
from deflow.errors import UserError
from tests.calls import call
from tests.conftest import CKPT

pytestmark = pytest.mark.usefixtures("short_episodes")


@pytest.fixture(scope="module")
def content(trained: Path) -> dict[str, Any]:
    return torch.load(trained / CKPT, weights_only=True)


def saved(content: Any, tmp_path: Path) -> Path:
    torch.save(content, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("other", [torch.zeros(3), [1, 2], {}, "deflow", 3, {"state_dict": {}}])
def test_something_else(other: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.ckpt is a checkpoint of something else"):
        load_checkpoint(saved(other, tmp_path))


def test_an_exported_policy_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "policy.onnx").touch()
    with pytest.raises(UserError, match="is an exported policy"):
        load_checkpoint(tmp_path / "policy.onnx")


@pytest.mark.parametrize("other", [b"", b"nonsense", b"PK\x03\x04"])
def test_no_checkpoint_at_all(other: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(other)
    with pytest.raises(UserError, match=r"cannot read .*a\.ckpt: it is not a whole checkpoint"):
        load_checkpoint(tmp_path / "a.ckpt")


NEEDED = ["state_dict", "deflow", "deflow.task", "deflow.spec", "deflow.config", "deflow.config.eval", *TO_RESUME]


@pytest.mark.parametrize("key", [*NEEDED, *OF_A_STAGE])
@pytest.mark.parametrize("edit", [lambda node, key: node.pop(key), lambda node, key: node.update({key: b"other"})])
def test_entries_that_are_missing_or_of_another_kind(
    key: str, edit: Callable[[dict, str], object], content: dict[str, Any], tmp_path: Path
) -> None:
    changed = torch.load(saved(content, tmp_path), weights_only=True)
    load_checkpoint(saved(changed, tmp_path), TO_RESUME | OF_A_STAGE)
    *outer, last = key.split(".")
    node = changed
    for name in outer:
        node = node[name]
    edit(node, last)
    with pytest.raises(UserError, match=rf"a\.ckpt is .*'{key}'"):
        load_checkpoint(saved(changed, tmp_path), TO_RESUME | OF_A_STAGE)


@pytest.mark.parametrize(
    "change,key",
    [
        ({"state_dict": {"a": 3}}, "state_dict"),
        ({"optimizer_states": [3]}, "optimizer_states"),
        ({"optimizer_states": [{"state": {}, "param_groups": [{"params": [0]}]}]}, "optimizer_states"),
        ({"optimizer_states": [{"state": {}, "param_groups": [3]}]}, "optimizer_states"),
    ],
)
def test_entries_that_hold_something_else(
    change: dict[str, Any], key: str, content: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"its entry '{key}' holds something else"):
        load_checkpoint(saved(content | change, tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("spec", spec) for spec in ([], [2], [2, 2, 1], [2, "two", 1, None], [2, 2, 1, None, 5], [2, 2, 0, None])),
        *(("spec", spec) for spec in ([2, 3, 2, None], [2, 2, 1, 7], [0, 2, 1, None])),
        *(("units", units) for units in ({"foo": [1.0]}, "x", {"low": 5.0}, {"mean": [1.0], "std": [1.0]})),
        *(("units", units) for units in ({"low": [-1.0, -1.0]}, {"low": [-1.0, 1.0], "high": [1.0, 1.0]})),
        *(("units", units) for units in ({"reward": [float("nan"), 0.0]}, {"mean": [1.0, 1.0], "std": [1.0, 0.0]})),
    ],
)
def test_sizes_and_units_that_are_none(key: str, value: Any, content: dict[str, Any], tmp_path: Path) -> None:
    changed = content | {"deflow": content["deflow"] | {key: value}}
    with pytest.raises(UserError, match=rf"its entry 'deflow\.{key}' (holds something else|is missing or of)"):
        load_checkpoint(saved(changed, tmp_path))


def with_settings(content: dict[str, Any], **agent: Any) -> dict[str, Any]:
    trained = content["deflow"]
    config = trained["config"] | {"agent": trained["config"]["agent"] | agent}
    return content | {"deflow": trained | {"config": config}}


def test_settings_that_make_no_agent(content: dict[str, Any], tmp_path: Path) -> None:
    flow = content["deflow"]["config"]["agent"]["behavior_flow"] | {"hidden": "abc"}
    path = saved(with_settings(content, behavior_flow=flow), tmp_path)
    with pytest.raises(UserError, match=r"agent\.behavior_flow\.hidden must be"):
        agent_of(load_checkpoint(path))


@pytest.mark.parametrize("damage", ["another shape", "one too few", "one too many"])
@pytest.mark.parametrize(
    "name", ["evaluate", "export", "distill", "inspect_data", "train ckpt", "resume final", "resume last"]
)
def test_weights_of_other_networks(damage: str, name: str, run: Path, point_data: Path, tmp_path: Path) -> None:
    path = run / CKPT
    if name == "resume last":
        path.unlink()
        path = path.with_name("last.ckpt")
    changed = torch.load(path, weights_only=True)
    weights, weight = changed["state_dict"], next(iter(changed["state_dict"]))
    if damage == "another shape":
        weights[weight] = torch.zeros(3, 3, 3)
    elif damage == "one too few":
        del weights[weight]
    else:
        weights["unknown"] = torch.zeros(3)
    torch.save(changed, path)
    with pytest.raises(UserError, match="differ from the configured ones") as raised:
        call(name.partition(" ")[0] if "resume" in name else name, run, point_data, tmp_path / "out")
    assert ("unknown" if damage == "one too many" else weight) in str(raised.value)
    assert len(str(raised.value)) < 500
    assert not (tmp_path / "out").exists()


def as_of_the_first_format(content: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint as it was written before there was a format: sources elsewhere, a discount in the critic."""
    content = copy.deepcopy(content)
    config = content["deflow"]["config"]
    del content["deflow"]["format"]
    config["data"]["source"]["_target_"] = "deflow.data.ogbench.OGBenchSource"
    config["agent"]["critic"]["discount"] = 0.99
    return content


def test_an_older_checkpoint_acts_and_does_not_go_on(content: dict[str, Any], tmp_path: Path) -> None:
    older = saved(as_of_the_first_format(content), tmp_path)
    read = load_checkpoint(older)
    assert read["deflow"]["config"] == content["deflow"]["config"]
    assert agent_of(read).state_dict().keys() == content["state_dict"].keys()
    with pytest.raises(UserError, match="written by an older version of deflow, whose run cannot go on"):
        load_checkpoint(older, TO_RESUME)


def test_a_newer_checkpoint_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    newer = saved(content | {"deflow": content["deflow"] | {"format": FORMAT + 1}}, tmp_path)
    with pytest.raises(UserError, match="written by a newer version of deflow"):
        load_checkpoint(newer)
