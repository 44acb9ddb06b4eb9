"""Images as observations, from the file to the policy: frames, crops, encoders, every agent, and the replay."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deflow.build import build_agent
from deflow.checkpoints import agent_of, load_checkpoint
from deflow.collecting import Collector
from deflow.data.augment import PADDING, crop, draw_shifts, shift, shift_on_device
from deflow.data.memory.frame_file import FrameFile
from deflow.data.memory.proposals import ProposalCache
from deflow.data.memory.replay import Replay
from deflow.data.memory.transitions import Transitions
from deflow.envs import ogbench
from deflow.errors import UserError
from deflow.evaluation.latency import latency
from deflow.evaluation.rollout import Evaluator
from deflow.nets.encoder import Impala, beside
from deflow.pipeline import train
from deflow.policy import Policy
from deflow.seeding import torch_generator
from deflow.types import Batch, Lookahead, Spec
from tests.agents.tester import check_agent, random_batch
from tests.conftest import compose_config, tiny_config

ONE_STEP = Lookahead(discount=0.9)
SIZE, FRAMES, LENGTH = 8, 2, 5  # pixels a side; frames of an observation; transitions of a trajectory
SPEC = Spec(FRAMES * SIZE * SIZE, 3, image=(FRAMES, SIZE, SIZE, 1))
TINY_ENCODER = ("networks.hidden=[16,16]", "networks.encoder.stacks=[2,2]", "networks.encoder.features=8")
AGENTS = ["deflow", "deflow agent/critic=flow agent.critic.value_range=[-1,0]", "deflow agent.best_of_n=3", "fql"]
AGENTS += ["ifql", "fawac", "fbrac", "flow_bc", "rlpd", "cal_ql", "bc", "iql", "rebrac", "srpo"]
AGENTS += ["idql agent.behavior.width=8", "cac agent.actor.hidden=[16,16]"]


def make_agent(overrides: str) -> Any:
    torch.manual_seed(0)
    settings = ("experiment=visual_cube_single", *TINY_ENCODER, *f"agent={overrides}".split())
    return build_agent(compose_config(*settings).agent, SPEC)


@pytest.fixture
def data() -> Transitions:
    """Two trajectories of images of one channel, the image in row `i` all of the value `i`."""
    rows = 2 * (LENGTH + 1)
    arrays = {
        "observations": np.full((rows, SIZE, SIZE, 1), np.arange(rows)[:, None, None, None], np.uint8),
        "actions": np.zeros((rows, 3)),
        "rewards": np.zeros(rows),
        "masks": np.ones(rows),
        "valids": np.tile([1.0] * LENGTH + [0.0], 2),
    }
    return Transitions.from_compact(arrays, "test", frames=FRAMES)


@pytest.mark.parametrize("overrides", AGENTS)
def test_every_agent_learns_from_images(overrides: str) -> None:
    check_agent(make_agent(overrides))


def test_several_actions_of_an_image_are_as_one_by_one() -> None:
    agent = make_agent("deflow")
    images, actions = random_batch(agent, 4).observations, torch.rand(12, 3)
    repeated = images.repeat_interleave(3, dim=0)
    assert torch.allclose(agent.critic.values(images, actions), agent.critic.values(repeated, actions), atol=1e-6)
    z = torch.randn(12, 3)
    proposals = agent.behavior_flow.propose(repeated, z)
    assert torch.allclose(agent.behavior_flow.propose(images, z), proposals, atol=1e-6)
    assert beside(torch.tensor([[1.0], [2.0]]), torch.zeros(4, 1))[:, 0].tolist() == [1, 1, 2, 2]


def test_the_adjoint_method_reaches_the_encoder() -> None:
    agent = make_agent("fbrac solver.method=rk4 solver.steps=20")
    images, z = random_batch(agent, 4).observations, torch.randn(4, 3)
    gradients = {}
    for method in ("backprop", "adjoint"):
        agent.zero_grad()
        agent.behavior_flow.sample(images, z, method).sum().backward()
        gradients[method] = agent.behavior_flow.field.mlp.encoder.stacks[0].first.weight.grad.clone()
    assert gradients["backprop"].abs().max() > 0
    assert torch.allclose(gradients["backprop"], gradients["adjoint"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (10, 7)])
def test_the_encoder_pools_as_the_original(height: int, width: int) -> None:
    encoder = Impala((1, height, width, 3), stacks=(4,), blocks=0, features=5)
    images = torch.randint(256, (2, 1, height, width, 3), dtype=torch.uint8)
    x = encoder.stacks[0].first(images[:, 0].permute(0, 3, 1, 2) / 255.0)
    # XLA's padding SAME: as many windows as half the size, rounded up, the smaller half of the padding first.
    out = [-(-size // 2) for size in (height, width)]
    total = [2 * (n - 1) + 3 - size for n, size in zip(out, (height, width), strict=True)]
    padded = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2), value=-1e9)
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))
    assert windows.shape[2:] == (*out,)
    assert torch.equal(encoder.stacks[0](images[:, 0].permute(0, 3, 1, 2) / 255.0), windows)
    features = F.gelu(encoder.linear(windows.relu().flatten(1)))
    assert features.shape == (2, 5)
    torch.testing.assert_close(encoder(images), features)


def test_the_papers_encoder() -> None:
    encoder = Impala((3, 64, 64, 3))
    # Three convolutions a stack, then 8 x 8 x 32 numbers into 512.
    convolutions = 9 * (9 * 16 + 2 * 16 * 16 + 16 * 32 + 2 * 32 * 32 + 3 * 32 * 32) + 3 * 16 + 6 * 32
    assert sum(p.numel() for p in encoder.parameters()) == convolutions + (8 * 8 * 32 + 1) * 512
    with pytest.raises(UserError, match="too small for 3 stacks"):
        Impala((3, 4, 4, 3))


def test_frames_are_stacked_within_the_trajectory(data: Transitions) -> None:
    batch, _ = data.batch(torch.tensor([0, 1, LENGTH + 1, LENGTH + 3]), ONE_STEP)
    assert batch.observations.shape == (4, FRAMES, SIZE, SIZE, 1)
    assert batch.observations.dtype == torch.uint8
    first = LENGTH + 1
    assert batch.observations[:, :, 0, 0, 0].tolist() == [[0, 0], [0, 1], [first, first], [first + 1, first + 2]]
    following = [[0, 1], [1, 2], [first, first + 1], [first + 2, first + 3]]
    assert batch.next_observations[:, :, 0, 0, 0].tolist() == following


def test_an_environment_stacks_frames_as_the_data_do(data: Transitions) -> None:
    env = ogbench.stack_frames(Film(), FRAMES)
    seen = [env.reset()[0], *(env.step(np.zeros(3))[0] for _ in range(LENGTH))]
    assert np.array_equal(np.stack(seen), data.observations(torch.arange(LENGTH + 1)).numpy())
    assert ogbench.spec_of(env) == SPEC
    assert env.observation_space.dtype == np.uint8


def test_a_crop_moves_s_and_its_successor_alike() -> None:
    images = torch.arange(SIZE * SIZE, dtype=torch.uint8).reshape(1, 1, SIZE, SIZE, 1).repeat(500, 2, 1, 1, 1)
    batch = Batch(images, *(torch.zeros(500) for _ in range(3)), images + 100, torch.zeros(500))
    cropped = crop(batch, draw_shifts(500, 1.0, torch.Generator().manual_seed(0)))
    assert torch.equal(cropped.observations + 100, cropped.next_observations)
    assert torch.equal(cropped.observations[:, 0], cropped.observations[:, 1])  # and all frames
    corners = cropped.observations[:, 0, PADDING, PADDING, 0]  # from a row and a column at most PADDING away
    assert len(corners.unique()) == (2 * PADDING + 1) ** 2
    moved = shift(images[:1], torch.tensor([[2], [-1]]))
    assert moved[0, 0, 0, 0, 0] == 2 * SIZE  # two down; the left border repeated
    assert moved[0, 0, 0, 1, 0] == 2 * SIZE
    assert moved[0, 0, -1, -1, 0] == SIZE * SIZE - 2  # the lower border repeated; one to the left


def test_pixel_by_pixel_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 2, 9, 7, 3), dtype=torch.uint8, generator=generator)
    shifts = draw_shifts(50, 1.0, generator)
    assert torch.equal(shift_on_device(images, shifts), shift(images, shifts))


def test_half_of_the_batches_are_cropped() -> None:
    images = torch.arange(SIZE, dtype=torch.uint8)[None, None, :, None, None].repeat(4, 1, 1, SIZE, 1)
    batch = Batch(images, *(torch.zeros(4) for _ in range(3)), images, torch.zeros(4))
    generator = torch.Generator().manual_seed(0)
    same = [crop(batch, draw_shifts(4, 0.5, generator)) is batch for _ in range(400)]
    assert 150 < sum(same) < 250


def test_cached_proposals_are_those_of_the_stacked_frames(data: Transitions, tmp_path: Path) -> None:
    flow = make_agent("deflow").behavior_flow
    cache = ProposalCache.load_or_compute(flow, data, 2, 0, tmp_path / "proposals.npy")
    rows = torch.arange(len(data.states))
    z = torch.randn(2 * len(rows), 3, generator=torch_generator(torch.device("cpu"), 0, "proposals", 0))
    expected = flow.propose(data.observations(rows), z).reshape(len(rows), 2, 3)
    drawn = cache.of(rows, cache.draw(len(rows), torch.Generator().manual_seed(0)))
    assert (drawn[:, None] - expected).abs().amax(-1).amin(-1).max() < 1e-3  # one of the two, in half precision


class Film(gymnasium.Env):
    """Every pixel counts the steps; an episode ends after as many as a trajectory of `data` has."""

    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8)  # type: ignore[arg-type]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return self._image(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self._image(), -1.0, False, self.steps == LENGTH, {"success": float(self.steps == LENGTH)}

    def _image(self) -> np.ndarray:
        return np.full(self.observation_space.shape, self.steps, np.uint8)  # type: ignore[arg-type]


def make_film() -> gymnasium.Env:
    return ogbench.stack_frames(Film(), FRAMES)


def test_a_policy_of_images_is_played_and_timed() -> None:
    policy = Policy(make_agent("deflow"))
    episodes = Evaluator(make_film, episodes=3, num_envs=2, seed=0).run(policy)
    assert [(e.success, e.length) for e in episodes] == [(1.0, LENGTH)] * 3
    assert latency(policy)["latency_ms_p50"] > 0


@pytest.mark.parametrize("agent", ["deflow", "cal_ql"])
def test_the_replay_gives_images_back_and_keeps_each_frame_once(agent: str, data: Transitions, tmp_path: Path) -> None:
    policy = make_agent(agent)
    if policy.traits.reads_returns:
        data = data.with_returns(0.9)
    collector = Collector(make_film, policy, 2, ONE_STEP, lambda reward: reward, seed=0)
    played = [collector.step() for _ in range(2 * LENGTH)]
    path = tmp_path / "new.bin"
    replay = Replay(data, data.starts, SPEC, steps=100, path=path)
    for batch in played:
        replay.add(batch)
    replay.flush()
    assert replay.added == 4 * LENGTH
    assert path.with_suffix(".frames").stat().st_size == (LENGTH + 1) * SIZE * SIZE  # the episodes show the same

    generator = torch.Generator().manual_seed(0)
    drawn = replay.sample(64, 1.0, generator, ONE_STEP)
    assert drawn.observations.dtype == torch.uint8
    stacks = (x[:, :, 0, 0, 0].tolist() for x in (drawn.observations, drawn.next_observations))
    pairs = {(*s, *s_next) for s, s_next in zip(*stacks, strict=True)}
    assert pairs == {(max(t - 1, 0), t, t, t + 1) for t in range(LENGTH)}

    half = 2 * LENGTH
    resumed = Replay(data, data.starts, SPEC, steps=100, path=path, added=half)
    later = Batch(*(None if column[0] is None else torch.cat(column) for column in zip(*played, strict=True)))
    resumed.add(Batch(*(None if column is None else column[half:] for column in later)))
    drawn, again = (r.sample(64, 0.5, torch.Generator().manual_seed(1), ONE_STEP) for r in (replay, resumed))
    for one, other in zip(drawn, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_lost_frames_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "new.frames"
    frames = FrameFile(path, (2, 2, 1), 0)
    frames.add(torch.zeros(1, 2, 2, 1, dtype=torch.uint8))
    frames.flush()
    with pytest.raises(UserError, match="lacks images"):
        FrameFile(path, (2, 2, 1), 2)


def test_what_needs_states_says_so(point_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="crop_probability is for images"):
        train(tiny_config(point_data, "experiment=pointmaze", "data.crop_probability=0.5"), tmp_path)


@pytest.fixture
def visual_data(tiny_data: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """Files of visual-cube-single whose images are noise: rendering them would take minutes."""
    folder = tiny_data("cube-single", "play")
    for suffix in ("", "-val"):
        with np.load(folder / f"cube-single-play-v0{suffix}.npz") as file:
            arrays = dict(file)
        rows = len(arrays["observations"])
        arrays["observations"] = np.random.default_rng(0).integers(256, size=(rows, 64, 64, 3), dtype=np.uint8)
        np.savez(tmp_path / f"visual-cube-single-play-v0{suffix}.npz", **arrays)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disabled", reason="no off-screen rendering here")
def test_a_pixel_task_from_file_to_online(visual_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_env = ogbench.make_env
    monkeypatch.setattr(ogbench, "make_env", lambda name, **kw: make_env(name, **({"max_episode_steps": 2} | kw)))
    overrides = ("experiment=visual_cube_single", "stages=offline_to_online", *TINY_ENCODER, "online_updates=2")
    config = tiny_config(visual_data, *overrides, "updates=2", "eval.every=2", "eval.num_envs=1", "eval.episodes=1")
    assert (config.data.source.frames, config.data.crop_probability) == (3, 0.5)
    summary = train(config, tmp_path / "run")
    assert summary["task"] == "visual-cube-single-play-singletask-task1-v0"
    assert summary["evaluations"] == 2
    assert (tmp_path / "run" / "replay" / "online_0.frames").stat().st_size % (64 * 64 * 3) == 0

    final = tmp_path / "run" / "checkpoints" / "1_online" / "final.ckpt"
    agent = agent_of(load_checkpoint(final))
    assert agent.spec == Spec(3 * 64 * 64 * 3, 5, image=(3, 64, 64, 3))
    assert agent.act(random_batch(agent, 2).observations, torch.randn(2, 1, 5)).shape == (2, 5)
