"""Acting: what a policy makes of observations, in which mode, with which noise; and how it is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

import deflow
from deflow.build import build_agent
from deflow.checkpoints import load_checkpoint, newest_checkpoint
from deflow.collecting import Collector
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.evaluation.diversity import policy_samples
from deflow.evaluation.rollout import Evaluator
from deflow.policy import Policy
from deflow.seeding import fold_seed
from deflow.types import Lookahead, Spec
from tests.agents.tester import Acting
from tests.commands import ROOT
from tests.conftest import CKPT, compose_config

TASK = "pointmaze-medium-navigate-singletask-task1-v0"


class Noise(Acting):
    """Acts with its noise, moved by the first number that it sees."""

    calls = 0

    def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        first = observations.flatten(1)[:, :1].float()
        return (first + z).tanh()


def make_env() -> Any:
    return ogbench.make_env(TASK, max_episode_steps=30)


def make_agent(*overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose_config("experiment=pointmaze", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, ogbench.spec_of(make_env()))


# What it does with observations.


def test_rows_are_what_single_observations_are_and_have_noise_of_their_own() -> None:
    one, several = Policy(Noise(Spec(4, 2)), seed=3), Policy(Noise(Spec(4, 2)), seed=3)
    for _ in range(3):
        single, rows = one.act(np.zeros(4)), several.act(np.zeros((5, 4)))
        assert (single.shape, rows.shape, single.dtype, rows.dtype) == ((2,), (5, 2), np.float32, np.float32)
        assert np.array_equal(single, rows[0])
        assert len(np.unique(rows)) == rows.size


def test_the_seed_decides_and_reset_begins_it_anew() -> None:
    policy, other = Policy(Noise(Spec(4, 2)), seed=3), Policy(Noise(Spec(4, 2)), seed=4)
    first, second = policy.act(np.zeros(4)), policy.act(np.zeros(4))
    policy.reset()
    third = policy.act(np.zeros(4))
    assert len({tuple(action) for action in (first, second, third, other.act(np.zeros(4)))}) == 4
    policy.reset(seed=3)
    assert np.array_equal(policy.act(np.zeros(4)), first)


def test_a_chunk_is_used_up_and_forgotten_by_reset() -> None:
    agent = Noise(Spec(4, 6, horizon=3))
    policy, again = Policy(agent, seed=1), Policy(agent, seed=1)
    whole = again.plan(np.zeros((1, 4)), again.draw_noise(np.random.default_rng(fold_seed(1, "act", 0)))[None])[0]
    agent.calls = 0
    taken = [policy.act(np.full(4, step)) for step in range(3)]
    assert agent.calls == 1
    assert np.array_equal(taken, whole)
    policy.act(np.zeros(4))
    policy.act(np.zeros(4))
    assert agent.calls == 2
    policy.reset()
    policy.act(np.zeros(4))
    assert agent.calls == 3
    with pytest.raises(UserError, match=r"plan for 1 observations is not at its end, got 2: call reset\(\)"):
        policy.act(np.zeros((2, 4)))
    policy.reset()
    assert policy.act(np.zeros((2, 4))).shape == (2, 2)


class Counting(gymnasium.Env):
    """Shows how many steps of an episode of `length` have been made; remembers the actions."""

    observation_space = gymnasium.spaces.Box(0, 100, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, length: int) -> None:
        self.length, self.episodes = length, []  # type: ignore[var-annotated]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.episodes.append([])
        return np.zeros(4, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        taken = self.episodes[-1]
        taken.append(action)
        return np.full(4, len(taken), np.float32), 0.0, len(taken) == self.length, False, {}


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_episodes_of_a_vector_environment_do_not_carry_out_each_others_plans(mode: AutoresetMode) -> None:
    policy = Policy(Noise(Spec(4, 6, horizon=3)), seed=1)
    players = [Counting(5), Counting(4)]
    envs = SyncVectorEnv([lambda player=player: player for player in players], autoreset_mode=mode)  # type: ignore[misc]
    observations, _ = envs.reset()
    policy.reset()
    begun = before = np.zeros(2, bool)
    for _ in range(16):
        observations, _, terminated, truncated, _ = envs.step(policy.act(observations))
        over = terminated | truncated
        begun, before = (over if mode is AutoresetMode.SAME_STEP else before), over
        policy.reset(rows=begun)
    for row, player in enumerate(players):
        rng = np.random.default_rng(fold_seed(1, "act", row))
        whole = [episode for episode in player.episodes if len(episode) == player.length]
        assert len(whole) > 1
        for episode in whole:
            for start in range(0, player.length, 3):  # what is decided at the episode's own states, with its own noise
                plan = policy.plan(np.full((1, 4), start), policy.draw_noise(rng)[None])[0]
                np.testing.assert_allclose(episode[start : start + 3], plan[: player.length - start], atol=1e-6)


@pytest.mark.parametrize("rows", [[True], [0, 1], True, [[True, False]], None])
def test_rows_to_begin_with(rows: Any) -> None:
    policy = Policy(Noise(Spec(4, 6, horizon=3)))
    policy.reset(rows=[True, True])  # nothing to forget yet
    policy.act(np.zeros((2, 4)))
    if rows is None:
        with pytest.raises(UserError, match="give reset\\(\\) a seed or rows, not both"):
            policy.reset(seed=1, rows=[True, False])
    else:
        with pytest.raises(UserError, match="rows= says of each of the 2 observations that act"):
            policy.reset(rows=rows)


@pytest.mark.parametrize(
    "observation,message",
    [
        (np.zeros(3), r"shape \(4,\), or several \('batch', 4\), got \(3,\)"),
        (np.zeros((2, 2, 4)), r"got \(2, 2, 4\)"),
        (np.zeros((0, 4)), r"got \(0, 4\)"),
        (0.0, r"got \(\)"),
        ([[0, 0, 0, 0], [0]], "is an array of shape"),
        (np.array(list("abcd")), "holds numbers, got <U1"),
        ([0, 0, 0, np.nan], "NaN or infinity"),
        ([0, 0, 0, 1e300], "NaN or infinity"),
    ],
)
def test_observations_of_another_kind(observation: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Policy(Noise(Spec(4, 2))).act(observation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("observation", [[1, 2, 3, 4], np.arange(4), torch.arange(4), np.arange(8.0)[::2] / 2 + 1])
def test_numbers_of_any_type(observation: Any) -> None:
    assert Policy(Noise(Spec(4, 2))).act(observation).shape == (2,)


def test_images_stay_images() -> None:
    class Looking(Noise):
        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            assert observations.dtype == torch.uint8
            return super().act(observations, z)

    policy = Policy(Looking(Spec(12, 2, image=(1, 2, 2, 3))))
    image = np.full((1, 2, 2, 3), 255, np.uint8)
    image.flags.writeable = False
    assert (policy.act(image) > 0.99).all()
    assert policy.act(image[None]).shape == (1, 2)
    with pytest.raises(UserError, match="is an image of uint8, got float64"):
        policy.act(image / 255)


# In which mode.


def test_it_acts_in_evaluation_mode_and_leaves_every_part_as_it_was() -> None:
    class Dropping(Noise):
        def __init__(self) -> None:
            super().__init__(Spec(4, 2))
            self.dropout, self.frozen = nn.Dropout(), nn.Dropout().eval()

        def act(self, observations: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return self.dropout(torch.ones_like(z))

    agent = Dropping()
    assert (Policy(agent).act(np.zeros((100, 4))) == 1).all()
    assert [part.training for part in (agent, agent.dropout, agent.frozen)] == [True, True, False]


@pytest.mark.parametrize("name", ["rlpd", "cal_ql"])
def test_a_gaussian_policy_is_measured_by_its_mode_and_collects_with_samples(name: str) -> None:
    agent = make_agent(f"agent={name}")
    states = torch.randn(3, agent.spec.observation_dim)
    for training in (True, False):
        agent.train(training)
        drawn = policy_samples(Policy(agent), states, 4, seed=0)
        assert set(drawn) == {"policy"}
        assert (drawn["policy"] == drawn["policy"][:, :1]).all()
        collector = Collector(make_env, agent, 1, Lookahead(0.99), lambda reward: reward, seed=0)
        collected = [collector.step() for _ in range(30)][-1]  # Cal-QL's transitions wait for the end of the episode
        modes = agent.act(collected.observations, collected.actions)
        assert (collected.actions - modes).abs().mean() > 0.1


def test_an_evaluation_is_the_loop_that_one_would_write_by_hand() -> None:
    agent = make_agent("agent.best_of_n=2")
    episodes = Evaluator(make_env, episodes=2, num_envs=1, seed=5).run(Policy(agent))
    env = make_env()
    for episode in episodes:
        seed, done, path = fold_seed(5, "episode", episode.index), False, []
        observation, _ = ogbench.seeded_reset(env, seed % 2**31)
        rng = np.random.default_rng(seed)
        while not done:
            path.append(tuple(map(float, env.unwrapped.get_xy())))
            z = torch.from_numpy(rng.standard_normal((1, 2, 2), dtype=np.float32))
            with torch.no_grad():
                action = agent.act(torch.from_numpy(observation.astype(np.float32))[None], z)[0].numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        assert episode.path == path


# How it is loaded.


def test_a_run_or_its_checkpoint(finished_run: Callable[..., Path]) -> None:
    run = finished_run()
    observation = make_env().reset(seed=0)[0]
    actions = [deflow.load(path, seed=2).act(observation) for path in (run, str(run), run / CKPT)]
    assert all(np.array_equal(action, actions[0]) for action in actions)
    assert actions[0].shape == (2,)
    assert not np.array_equal(deflow.load(run, seed=3).act(observation), actions[0])
    assert not deflow.load(run).agent.training
    assert deflow.load(run, best_of_n=4).agent.act_noise_shape == (4, 2)


def test_the_newest_stage_finished_or_not(tmp_path: Path) -> None:
    for name in ("2_a/final.ckpt", "10_b/last.ckpt", "11_c/other"):
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "10_b" / "last.ckpt"
    (tmp_path / "checkpoints" / "10_b" / "final.ckpt").touch()
    assert newest_checkpoint(tmp_path).name == "final.ckpt"


def test_one_of_several_seeds(finished_run: Callable[..., Path]) -> None:
    run = finished_run("seeds=2")
    with pytest.raises(UserError, match=r"several seeds: give run_seed, or the path of seed_0.ckpt, seed_1.ckpt"):
        deflow.load(run)
    with pytest.raises(UserError, match=r"no seed_7.ckpt; seeds found: seed_0.ckpt, seed_1.ckpt"):
        deflow.load(run, run_seed=7)
    chosen, named = deflow.load(run, run_seed=1), deflow.load((run / CKPT).with_name("seed_1.ckpt"))
    assert np.array_equal(chosen.act(np.zeros(2)), named.act(np.zeros(2)))


@pytest.mark.parametrize(
    "name,message",
    [("missing", "no checkpoint"), ("folder", "no run's folder"), ("policy.onnx", "no whole ONNX model")],
)
def test_what_is_no_run(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "policy.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(UserError, match=message) as error:
        deflow.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_settings_that_are_none(finished_run: Callable[..., Path]) -> None:
    run = finished_run()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"critic": 1}, "does not know 'critic'"),
        ({"best_of_n": 0}, "best_of_n"),
        ({"device": "toaster"}, "cannot use device=toaster"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": None}, "seed must be a whole number of at least 0"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message) as error:
            deflow.load(run, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="run_seed chooses among the seeds in a run's folder"):
        deflow.load(run / CKPT, run_seed=0)
    with pytest.raises(UserError, match="best_of_n: FQL, of which the checkpoint is, has none"):
        deflow.load(finished_run("agent=fql"), best_of_n=4)


def test_a_file_names_nobodys_code_unless_it_is_trusted(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange.py").write_text(
        "from pathlib import Path\nfrom deflow.agents.deflow import DeFlow\n"
        "class Mine(DeFlow): ...\nPath(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    checkpoint = load_checkpoint(finished_run() / CKPT)
    checkpoint["deflow"]["config"]["agent"]["_target_"] = "strange.Mine"
    torch.save(checkpoint, tmp_path / "strange.ckpt")
    with pytest.raises(UserError, match=r"names strange.Mine, which a file may not"):
        deflow.load(tmp_path / "strange.ckpt")
    assert not (tmp_path / "ran").exists()
    assert type(deflow.load(tmp_path / "strange.ckpt", trust=["strange"]).agent).__name__ == "Mine"
    with pytest.raises(UserError, match="which a file may not"):
        deflow.load(tmp_path / "strange.ckpt")


def test_the_readmes_example(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "deflow.load" in block]
    (folder,) = re.findall(r'deflow\.load\("([^"]*)"', code)
    shutil.copytree(finished_run(), tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"env": make_env()}
    exec(code, names)  # the README's own text
    assert names["action"].shape == (2,)
