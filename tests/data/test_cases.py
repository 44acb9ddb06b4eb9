"""Inputs of the kinds that people bring: each is read rightly, or refused in one line that names what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deflow.data.measures.card import describe
from deflow.data.memory.transitions import Transitions
from deflow.data.sources.columns import checked_columns
from deflow.data.sources.custom import CustomSource
from deflow.errors import UserError
from deflow.inspection import inspect
from deflow.pipeline import train
from tests.conftest import compose_config, tiny_config

Columns = dict[str, Any]
KEYS = {"observations": "observations", "actions": "actions", "rewards": "rewards", "terminals": "terminals"}
ALL_KEYS = KEYS | {"timeouts": "timeouts", "next_observations": "next_observations"}


def walks(episodes: int = 12, length: int = 30, size: int = 3, seed: int = 0) -> Columns:
    """Point masses pushed about; every second episode ends its task."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.9, 0.9, (episodes, length, size)).astype(np.float32)
    starts = 3 * rng.normal(size=(episodes, 1, size)).astype(np.float32)
    states = np.concatenate([starts, starts + 0.1 * np.cumsum(actions, axis=1)], axis=1)
    ends = np.zeros((episodes, length), bool)
    ends[:, -1] = True
    goal = np.arange(episodes)[:, None] % 2 == 0
    return {
        "observations": states[:, :-1].reshape(-1, size),
        "actions": actions.reshape(-1, size),
        "rewards": -np.abs(states[:, 1:]).sum(-1).reshape(-1),
        "terminals": (ends & goal).reshape(-1),
        "timeouts": (ends & ~goal).reshape(-1),
        "next_observations": states[:, 1:].reshape(-1, size),
    }


def together(several: Iterable[Columns]) -> Columns:
    return {name: np.concatenate(columns) for name, *columns in zip(ALL_KEYS, *map(dict.values, several), strict=True)}


def saved(folder: Path, columns: Columns, name: str = "data.npz") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        np.savez(file, **columns)
    return str(folder / name)


def whole(path: str, keys: dict[str, str] = ALL_KEYS) -> tuple[Transitions, Transitions | None]:
    return CustomSource(path, keys).load()


def in_all(parts: tuple[Transitions, Transitions | None]) -> list[float]:
    """The rewards of all transitions, sorted."""
    return sorted(value for part in parts if part is not None for value in part.rewards[part.starts].tolist())


@pytest.mark.parametrize("columns", [("rewards",), ("terminals", "timeouts"), ("rewards", "terminals", "timeouts")])
def test_columns_of_one_number_are_squeezed(columns: tuple[str, ...], tmp_path: Path) -> None:
    data = walks()
    wide = data | {name: data[name][:, None] for name in columns}
    assert in_all(whole(saved(tmp_path, wide))) == in_all(whole(saved(tmp_path / "b", data)))


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        (lambda c: (c["actions"] > 0).astype(np.float32), "0 to 1"),
        (lambda c: c["actions"] > 0, "0 to 1"),
        (lambda c: np.abs(np.trunc(c["actions"][:, :1] * 4)), "0 to 3"),
        (lambda c: np.sign(c["actions"]), None),
        (lambda c: np.abs(np.trunc(c["actions"] * 1000)), None),
    ],
)
def test_floats_that_may_be_choices_are_said_to_be_amounts(
    actions: Callable[[Columns], Any], said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):  # files of one set
        columns = walks(seed=number)
        saved(tmp_path, columns | {"actions": actions(columns)}, f"{number}.npz")
    whole(str(tmp_path), KEYS)
    expected = [f"all actions are whole numbers from {said}: taken as amounts"] if said else []
    lines = [record.getMessage() for record in caplog.records if "all actions are" in record.getMessage()]
    assert [line.partition(": ")[2].partition(",")[0] for line in lines] == expected


def test_columns_of_booleans_are_numbers() -> None:
    columns = {name: column > 0 for name, column in walks().items() if name != "timeouts"}
    found = checked_columns(columns, "a file")
    assert {name: column.dtype.kind for name, column in found.items()} == {
        "observations": "f",
        "actions": "f",
        "rewards": "f",
        "next_observations": "f",
        "terminals": "b",
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"terminals": lambda c: np.where(c["terminals"], 1.0, np.nan)}, r"'terminals' must be 0 or 1 .* 354 hold nan"),
        ({"terminals": lambda c: c["terminals"] * 2}, r"'terminals' must be 0 or 1 .* 6 hold 2"),
        ({"terminals": lambda c: c["terminals"].astype(str)}, r"'terminals' must hold numbers, got <U5"),
        ({"terminals": lambda c: ~c["terminals"]}, r"'terminals' are 1 in 98% of the rows: they look like masks"),
        ({"rewards": lambda c: np.stack([c["rewards"]] * 2, 1)}, r"'rewards' must have one number a row"),
        ({"rewards": lambda c: c["rewards"][:-1]}, "columns of different lengths"),
        (
            {"actions": lambda c: (c["actions"] * 4).astype(int)},
            "'actions' are whole numbers up to 3: discrete actions",
        ),
        ({"actions": lambda c: (c["actions"][:, :1] > 0).astype(int)}, "whole numbers up to 1: discrete actions"),
        ({"actions": lambda c: (c["actions"][:, 0] > 0).astype(int)}, "whole numbers up to 1: discrete actions"),
        ({"actions": lambda c: c["actions"][:, :1] > 0}, "whole numbers up to 1: discrete actions"),
        ({"actions": lambda c: c["actions"][:, 0] > 0}, "whole numbers up to 1: discrete actions"),
        ({"observations": lambda c: c["observations"][:, 0]}, "'observations' must have two axes"),
        ({"observations": lambda c: c["observations"][:, None]}, r"two axes .* \(360, 1, 3\); images are not read"),
        (
            {"observations": lambda c: c["observations"][:, :2]},
            r"'next_observations' have .* \(360, 3\), 'observations'",
        ),
        ({"observations": lambda c: np.array([[1], [1, 2]], object)}, "holds objects, such as episodes of different"),
    ],
)
def test_what_cannot_be_meant_is_named(change: dict[str, Callable[[Columns], Any]], says: str, tmp_path: Path) -> None:
    columns = walks()
    path = saved(tmp_path, columns | {name: make(columns) for name, make in change.items()})
    with pytest.raises(UserError, match=says):
        whole(path, KEYS | {"next_observations": "next_observations"})


def test_columns_that_are_not_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.npz", "b.npz"):
        saved(tmp_path, walks(), name)
    source = CustomSource(str(tmp_path), KEYS)
    with caplog.at_level(logging.WARNING):
        source.spec()
        source.load()
    said = "its columns timeouts, next_observations are not read; to read them: data.source.keys.timeouts"
    assert caplog.text.count(said) == 1  # of the whole set


def test_next_observations_of_another_precision_follow(tmp_path: Path) -> None:
    columns = walks()
    far = {name: columns[name].astype(np.float64) * 1000 + 5000 for name in ("observations", "next_observations")}
    rounded = columns | far | {"next_observations": far["next_observations"].astype(np.float16)}
    for keys in (ALL_KEYS, {**ALL_KEYS, "timeouts": None, "terminals": None}):  # the ends by the jumps alone, too
        train_part, validation = whole(saved(tmp_path, rounded), keys)
        assert validation is not None
        assert len(train_part.chunk_starts(30)) + len(validation.chunk_starts(30)) == 12


@pytest.mark.parametrize(("constant", "precision"), [(5000.3, np.float32), (0.3, np.float16)])
def test_what_never_changes_is_the_same_in_another_precision(constant: float, precision: type, tmp_path: Path) -> None:
    columns = walks()
    for name in ("observations", "next_observations"):
        columns[name] = np.pad(columns[name].astype(np.float64), ((0, 0), (0, 1)), constant_values=constant)
    columns["next_observations"] = columns["next_observations"].astype(precision)
    train_part, validation = whole(saved(tmp_path, columns))
    assert validation is not None
    assert len(train_part.chunk_starts(30)) + len(validation.chunk_starts(30)) == 12


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e7])
def test_trajectories_are_found_in_any_units(scale: float, tmp_path: Path) -> None:
    columns = walks()
    # A number that is 0, and is computed twice.
    computed = {"observations": 0.0, "next_observations": 3e-9 if scale > 1e-7 else 0.0}
    scaled = {name: np.column_stack([scale * columns[name], np.full(360, zero)]) for name, zero in computed.items()}
    keys = {**ALL_KEYS, "timeouts": None, "terminals": None}  # by the jumps alone
    train_part, validation = whole(saved(tmp_path, columns | scaled), keys)
    assert validation is not None
    assert len(train_part.chunk_starts(30)) + len(validation.chunk_starts(30)) == 12


def test_states_of_whole_numbers_are_numbers(tmp_path: Path) -> None:
    columns = walks()
    pixels = {name: (columns[name] * 30 + 128).astype(np.uint8) for name in ("observations", "next_observations")}
    train_part, _ = whole(saved(tmp_path, columns | pixels))
    assert str(train_part.states.dtype) == "torch.float32"


def test_a_folder_is_one_data_set(tmp_path: Path) -> None:
    files = [walks(episodes=2, seed=number) for number in range(10)]
    for number, columns in enumerate(files):
        saved(tmp_path / "folder", columns, f"{number}.npz")
    parts = whole(str(tmp_path / "folder"))
    assert [len(part) for part in parts if part is not None] == [18 * 30, 2 * 30]
    assert in_all(parts) == sorted(value for columns in files for value in columns["rewards"].tolist())
    train_part, validation = parts
    assert validation is not None
    assert not set(train_part.starts.tolist()) & set(validation.starts.tolist())


def test_a_file_an_episode(tmp_path: Path) -> None:
    for number in range(6):
        saved(tmp_path / "folder", walks(episodes=1, length=10 + number, seed=number), f"{number}.npz")
    keys = {"observations": "observations", "actions": "actions", "rewards": "rewards"}
    assert [len(part.first_rows[part.starts].unique()) for part in whole(str(tmp_path / "folder"), keys)] == [5, 1]


def test_files_of_other_sizes_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "folder", walks(), "a.npz")
    saved(tmp_path / "folder", walks(size=4), "b.npz")
    with pytest.raises(UserError, match=r"b\.npz: its states are .* 4\), those of the files before it .* 3\)"):
        whole(str(tmp_path / "folder"))


def test_unpacked_files_know_the_columns_that_they_were_made_of(tmp_path: Path) -> None:
    columns = walks()
    saved(tmp_path / "folder", columns | {"other": np.full(360, 100.0)}, "a.npz")
    assert in_all(whole(str(tmp_path / "folder")))[0] < 0
    assert set(in_all(whole(str(tmp_path / "folder"), ALL_KEYS | {"rewards": "other"}))) == {100.0}


def test_the_split_does_not_depend_on_the_runs_seed(tmp_path: Path) -> None:
    path = saved(tmp_path, walks())
    configs = [compose_config("experiment=custom", f"data.source.path={path}", f"seed={seed}") for seed in (0, 1)]
    assert configs[0].data.source == configs[1].data.source


@pytest.mark.parametrize(
    ("columns", "overrides", "says"),
    [
        (walks(episodes=1, length=300), (), "a single trajectory: all of it is trained on, and nothing validated"),
        (
            {
                name: np.concatenate([walks(1, 3 if n % 2 else 40, seed=n)[name] for n in range(14)])
                for name in ALL_KEYS
            },
            ("agent.horizon=5", "data.source.seed=1"),
            "",
        ),
        (walks(), (), "4 next observations lie far from the state before them"),  # its timeouts are not read
    ],
)
def test_trains(
    columns: Columns, overrides: tuple[str, ...], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, columns, "my robot lr=0.1.npz")
    keys = ("data.source.keys.timeouts=timeouts",) if "4 next" not in says else ()
    with caplog.at_level(logging.WARNING):
        config = tiny_config(tmp_path, "experiment=custom", f"data.source.path='{path}'", *keys, *overrides)
        summary = train(config, tmp_path / "run")
    assert summary["updates"] == 6
    assert says in caplog.text


def late(columns: Columns) -> Columns:
    """Ends one row too late."""
    return columns | {"terminals": np.roll(columns["terminals"], 1), "timeouts": np.roll(columns["timeouts"], 1)}


@pytest.mark.parametrize("length", [3, 10, 30, 300])
def test_misplaced_ends_are_found_in_short_episodes_too(length: int, tmp_path: Path) -> None:
    keys = ALL_KEYS | {"next_observations": None}
    for columns, expected in ((walks(length=length), 0), (late(walks(length=length)), 11)):
        arrays, _ = CustomSource(saved(tmp_path, columns), keys).arrays()
        assert describe(arrays)["jumps_inside_trajectories"] == expected


def test_inspection_survives(tmp_path: Path) -> None:
    columns = walks()
    columns["observations"][7, 0] = np.nan
    for name, data in (("nan", columns), ("one", walks(size=1))):
        path = saved(tmp_path, data, f"{name}.npz")
        out = tmp_path / "out"
        overrides = ("task=custom", f"data.source.path={path}", f"out={out}", "data.source.keys.timeouts=timeouts")
        result = inspect(compose_config(*overrides, config_name="inspect_data"))
        assert result["card"]["rows_not_finite"] == (name == "nan")
        assert (out / f"{name}.png").exists()


def test_the_card_does_not_call_clipped_what_is_scaled(tmp_path: Path) -> None:
    columns = walks()
    wide = columns | {"actions": 2 * columns["actions"]}
    wide["observations"][7, 0] = np.nan  # such rows say nothing of the range
    overrides = ("task=custom", f"data.source.path={saved(tmp_path, wide)}", f"out={tmp_path}")
    variances = []
    for setting, outside in ((), False), (("data.source.action_range=[-1,1]",), True):
        result = inspect(compose_config(*overrides, *setting, config_name="inspect_data"))
        variances.append(result["action_variance"]["data"]["mean"])
        card = result["card"]
        assert (card["rows_with_actions_outside"] > 0) == outside
        assert any("clipped" in warning for warning in card["warnings"]) == outside
        assert card["action_range"][0]["max"] > 1  # in the file's numbers
    assert variances == pytest.approx([1 / 3, 2 / 3], rel=0.1)  # uniform in [-1, 1]; half of the components at a limit
