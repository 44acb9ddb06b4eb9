"""The online stage: what is collected, how it goes on after a kill, and that every agent can take part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from deflow.agents.algorithm import Traits
from deflow.checkpoints import load_checkpoint
from deflow.collecting import Collector
from deflow.data.memory.replay import Replay
from deflow.data.memory.transitions import Transitions
from deflow.errors import UserError
from deflow.loggers import read_metrics
from deflow.pipeline import train
from deflow.types import Batch, Lookahead, Spec
from tests.agents.tester import Acting
from tests.conftest import tiny_config
from tests.test_pipeline import assert_equal_weights, weights

LENGTH, GOAL = 7, 4  # a time limit; steps to the goal in episodes that reach it


class Corridor(gymnasium.Env):
    """The observation counts steps; every second episode ends at the goal, the others at the time limit."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.episodes += 1
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        at_goal = self.episodes % 2 == 0 and self.steps == GOAL
        observation = np.full(1, self.steps, np.float32)
        return observation, float(self.steps), at_goal, self.steps == LENGTH, {"success": at_goal}


class Tenth(Acting):
    """Acts with a tenth of the observation, and a chunk of it."""

    def __init__(self, horizon: int = 1, reads_returns: bool = False) -> None:
        super().__init__(Spec(1, horizon, horizon))
        self.traits = Traits(reads_returns=reads_returns)

    def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return observations.repeat(1, self.spec.horizon) / 10


def collect(steps: int, horizon: int = 1, num_envs: int = 1, rounds: int = 2 * LENGTH) -> Batch:
    span = Lookahead(0.9, steps, horizon)
    collector = Collector(Corridor, Tenth(horizon), num_envs, span, lambda reward: reward - 1, seed=0)
    batches = [collector.step() for _ in range(rounds)]
    return Batch(*(torch.cat(column) for column in list(zip(*batches, strict=True))[:6]))


def test_time_limits_leave_the_mask_and_goals_do_not() -> None:
    batch = collect(steps=1, rounds=LENGTH + GOAL)
    assert batch.observations[:, 0].tolist() == [*range(LENGTH), *range(GOAL)]
    assert batch.next_observations[:, 0].tolist() == [*range(1, LENGTH + 1), *range(1, GOAL + 1)]
    assert batch.rewards.tolist() == [*range(LENGTH), *range(GOAL)]  # as the data call them
    assert batch.discounts.tolist() == pytest.approx([0.9] * (LENGTH + GOAL - 1) + [0.0])
    assert torch.allclose(batch.actions, batch.observations / 10)


def test_next_actions_are_those_decided_there_and_at_the_end_the_last_again() -> None:
    batch = collect(steps=1, rounds=LENGTH + GOAL)
    decided = [*range(1, LENGTH), LENGTH - 1, *range(1, GOAL), GOAL - 1]
    assert batch.next_actions[:, 0].tolist() == pytest.approx([step / 10 for step in decided])
    chunks = collect(steps=3, horizon=3, rounds=LENGTH + GOAL)  # begun at 0 and 3, then cut; at 0 and 3, where it ends
    assert chunks.next_actions[:, 0].tolist() == pytest.approx([0.3, 0.6, 0.3, 0.3])


@pytest.mark.parametrize("n_step", [2, 3, 20])
def test_n_step_returns_are_those_of_the_data(n_step: int) -> None:
    # The same two episodes as a data set: the last state of a trajectory is a row of its own.
    observations = [*range(LENGTH + 1), *range(GOAL + 1)]
    arrays = {
        "observations": np.array(observations, np.float32)[:, None],
        "actions": np.array(observations, np.float32)[:, None] / 10,
        "rewards": np.array(observations, np.float32),
        "masks": np.array([1.0] * (LENGTH + GOAL) + [0.0] + [1.0]),
        "valids": np.array([1.0] * LENGTH + [0.0] + [1.0] * GOAL + [0.0]),
    }
    data = Transitions.from_compact(arrays, "test")
    expected, _ = data.batch(data.starts, Lookahead(0.9, n_step))
    batch = collect(steps=n_step, rounds=LENGTH + GOAL)

    def rows(b: Batch) -> list[tuple[float, ...]]:  # sorted: they end in another order than they begin
        columns = b.observations[:, 0], b.next_observations[:, 0], b.rewards, b.discounts
        return sorted(zip(*(column.tolist() for column in columns), strict=True))

    assert np.allclose(rows(batch), rows(expected))


def test_chunks() -> None:
    batch = collect(steps=3, horizon=3, rounds=LENGTH + GOAL)
    # 7 steps are two whole chunks and one that the time limit cuts; 4 steps are one and one that ends at the goal.
    assert batch.observations[:, 0].tolist() == [0, 3, 0, 3]
    assert batch.next_observations[:, 0].tolist() == [3, 6, 3, 4]
    assert batch.actions.shape == (4, 3)
    assert batch.discounts.tolist() == pytest.approx([0.729, 0.729, 0.729, 0.0])
    assert batch.rewards.tolist() == pytest.approx([0 + 0.9 + 2 * 0.81, 3 + 4 * 0.9 + 5 * 0.81, 2.52, 3.0])


def test_environments_side_by_side() -> None:
    batch = collect(steps=1, num_envs=3, rounds=4)
    assert batch.observations[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # the newest wait for their next action


def test_returns_are_those_of_the_data() -> None:
    collector = Collector(Corridor, Tenth(reads_returns=True), 1, Lookahead(0.9), lambda reward: reward - 1, seed=0)
    batches = [collector.step() for _ in range(LENGTH + GOAL + 2)]
    # An episode is given when it is over; of what earned rewards and was cut, that is all.
    sizes = [len(batch.rewards) for batch in batches]
    assert sizes == [LENGTH if n == LENGTH else GOAL if n == LENGTH + GOAL else 0 for n in range(1, len(sizes) + 1)]
    cut, whole = batches[LENGTH - 1], batches[LENGTH + GOAL - 1]
    assert cut.returns is not None
    assert whole.returns is not None
    assert float(cut.returns[0]) == pytest.approx(sum(0.9**k * k for k in range(LENGTH)))
    assert whole.returns.tolist() == pytest.approx([0.9 + 2 * 0.81 + 3 * 0.729, 1 + 1.8 + 2.43, 2 + 2.7, 3])


ONLINE = ("online_updates=8", "eval.every=4", "updates=4")


def run(folder: Path, data: Path, *overrides: str) -> dict:
    return train(tiny_config(data, "experiment=pointmaze", *ONLINE, *overrides), folder)


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("stages.online.freeze=[behavior_flow]", "stages.online.environment.online_share=0.5"),
        ("agent.horizon=3", "stages.online.environment.online_share=1", "checkpoint_every=8"),
        ("data.n_step=3", "stages.online.environment.num_envs=2"),
        ("agent=fql", "stages.online.environment.updates_per_step=2"),
        ("agent=ifql", "agent.best_of_n=2"),
        ("agent=fawac",),
        ("agent=fbrac",),
        ("agent=cal_ql", "agent.samples=2", "stages.online.environment.online_share=0.5"),
    ],
)
def test_offline_to_online(overrides: tuple[str, ...], point_data: Path, tmp_path: Path) -> None:
    summary = run(tmp_path, point_data, "stages=offline_to_online", *overrides)
    assert summary["updates"] == 12
    assert set(summary["updates_per_second"]) == {"joint", "online"}
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "eval/success" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    before_and_after = {"joint": rows[0]["eval/return"], "online": rows[2]["eval/return"]}
    assert summary["eval/return"]["last_of_stage"] == before_and_after
    # The optimizer goes on where it was.
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "1_online" / "final.ckpt")
    (optimizer,) = checkpoint["optimizer_states"]
    assert {float(moments["step"]) for moments in optimizer["state"].values()} == {12.0}
    # Whose transitions the batches were made of.
    online = [row for row in read_metrics(tmp_path / "metrics.csv") if "online/transitions" in row]
    assert [row["step"] for row in online] == [6, 8, 10, 12]
    asked = next((float(o.split("=")[1]) for o in overrides if "online_share" in o), None)
    if online[-1]["online/transitions"]:  # an agent that reads returns gets them when the first episode is over
        assert asked in (None, online[-1]["online/share_of_batch"])
    before, after = (weights(tmp_path, stage) for stage in ("0_joint", "1_online"))
    frozen = any("freeze" in override for override in overrides)
    for name in before:
        if name.startswith("behavior_flow"):
            assert torch.equal(before[name], after[name]) == frozen, name


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop the run, as a kill does, when its batch `number` of the online stage is drawn."""
    sample, drawn = Replay.sample, []

    def counting(self: Replay, *args: Any) -> Batch:
        drawn.append(1)
        if len(drawn) == number:
            raise SystemExit("killed")
        return sample(self, *args)

    monkeypatch.setattr(Replay, "sample", counting)


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize(
    ("at", "transitions", "overrides"),
    [
        (2, 29, ()),  # before the stage has a checkpoint of its own
        (27, 29, ()),  # after an episode of 20 steps has ended
        (27, 24, ("data.n_step=3", "stages.online.environment.num_envs=2")),  # three in each are under way at the end
        (15, 29, ("agent.horizon=1", "agent.best_of_n=2")),  # in the middle of the first episode
        (27, 9, ("agent.horizon=3",)),  # six whole chunks in 20 steps, three in 10
        (27, 20, ("agent=cal_ql", "agent.samples=2")),  # those of the episode that is over
    ],
)
def test_resume_is_bit_for_bit(
    at: int,
    transitions: int,
    overrides: tuple[str, ...],
    finished_run: Callable[..., Path],
    point_data: Path,
    tmp_path: Path,
) -> None:
    settings = ("stages=offline_to_online", "online_updates=30", "checkpoint_every=4", *overrides)
    whole = finished_run(*ONLINE, *settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, at)
        with pytest.raises(SystemExit):
            run(tmp_path, point_data, *settings)
    train(tiny_config(point_data, "experiment=pointmaze", *ONLINE, f"resume={tmp_path}"), tmp_path)
    assert_equal_weights(*(weights(folder, "1_online") for folder in (whole, tmp_path)))
    logs = [(folder / "replay" / "online_0.bin").read_bytes() for folder in (whole, tmp_path)]
    assert logs[0] == logs[1]
    numbers = 2 * 2 + 2 * 2 * (3 if "agent.horizon=3" in overrides else 1) + 2 + ("agent=cal_ql" in overrides)
    assert len(logs[0]) == transitions * numbers * 4
    rows = [(folder / "metrics.csv").read_text() for folder in (whole, tmp_path)]
    assert rows[0] == rows[1]


@pytest.mark.usefixtures("short_episodes")
def test_online_from_a_checkpoint_of_an_offline_run(
    finished_run: Callable[..., Path], point_data: Path, tmp_path: Path
) -> None:
    offline = finished_run() / "checkpoints" / "0_joint" / "final.ckpt"
    summary = run(tmp_path, point_data, "stages=online", f"ckpt={offline}", "trainer.log_every_n_steps=1")
    assert summary["stages"] == {"online": 8}
    rows = read_metrics(tmp_path / "metrics.csv")
    assert any("train/refiner/trust_region/multiplier" in row for row in rows)


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.online.environment.num_envs=0", "num_envs must be a whole number of at least 1"),
        ("stages.online.environment.updates_per_step=0", "updates_per_step must be a number above 0"),
        ("stages.online.environment.online_share=2", "online_share must be a number from 0 to 1"),
    ],
)
def test_impossible_settings(override: str, says: str, point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run(tmp_path, point_data, "stages=online", override)
