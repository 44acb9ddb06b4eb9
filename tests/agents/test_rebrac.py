"""ReBRAC: the shared checks, its rhythm, and the original's numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam

from deflow.agents.rebrac import ReBRAC, SmoothingNoise, TanhActor
from deflow.build import build_agent
from deflow.modules.critic import Critic
from deflow.types import Batch, Spec
from tests.agents.tester import check_agent, random_batch, squared_targets
from tests.conftest import compose_config


def make(*overrides: str) -> ReBRAC:
    torch.manual_seed(0)
    config = compose_config("experiment=cube_single", "agent=rebrac", "networks.hidden=[16,16]", *overrides)
    return build_agent(config.agent, Spec(5, 3))


def test_shared_checks() -> None:
    check_agent(make())


def test_the_papers_settings() -> None:
    weights = {}
    for task in ("antmaze_large", "cube_single", "puzzle_3x3", "visual_scene"):
        agent = compose_config(f"task={task}", "agent=rebrac").agent
        weights[task] = agent.actor_weight, agent.critic_weight
    assert weights == {
        "antmaze_large": (0.003, 0.01),
        "cube_single": (1, 0),
        "puzzle_3x3": (0.3, 0.01),
        "visual_scene": (0.1, 0.01),
    }


def test_exploring_is_near_acting() -> None:
    agent, batch = make(), random_batch(make())
    z = torch.randn(16, 3)
    acted, explored = agent.act(batch.observations, z), agent.explore(batch.observations, z)
    assert torch.equal(acted, agent.act(batch.observations, -z))
    assert 0.05 < (acted - explored).abs().mean() < 0.5


def test_the_target_is_held_near_the_datas_next_action_from_a_clipped_noise_away() -> None:
    agent: Any = make("agent.critic_weight=2", "agent.noise=0.2", "agent.noise_clip=0.5")
    batch = random_batch(agent)
    agent.actor.target_actions = lambda s: torch.zeros(len(s), 3)
    agent.critic.target_values = lambda s, a: torch.tensor([[1.0], [3.0]]) * a[:, 0]
    z_next = torch.full((16, 3), 10.0)  # a noise of 2, which is cut to 0.5
    targets = batch.rewards + batch.discounts * (0.5 - 2 * (0.5 - batch.next_actions).square().sum(-1))
    torch.testing.assert_close(squared_targets(agent, batch, SmoothingNoise(z_next)), targets.square().mean())


def test_targets_move_with_the_actor() -> None:
    agent, batch = make("agent.actor.tau=0.5", "agent.critic.tau=0.5"), random_batch(make())
    optimizer = agent.configure_optimizers()
    moved = []
    for number in range(4):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        agent.begin_update(number)
        optimizer.zero_grad()
        torch.stack([loss for _, loss, _ in agent.losses(batch, agent.noise(batch, number))]).sum().backward()
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()
        after = agent.state_dict()
        moved.append({name.rsplit(".", 3)[0] for name in after if not torch.equal(before[name], after[name])})
    assert moved[0] == {"critic.online"}
    assert moved[1] == {"critic.online", "actor.online", "critic.target"}  # the actor's target is where it is going
    assert moved[2] == {"critic.online"}
    assert moved[3] == {"critic.online", "actor.online", "critic.target", "actor.target"}


def theirs(name: str, depth: int = 3) -> str:
    """The original's name of one of our parameters."""
    part, network, kind, index, tensor = name.split(".")
    prefix = "" if network == "online" else "target_"
    leaf = "bias" if tensor == "bias" else ("kernel" if kind == "layers" else "scale")
    if part == "actor" and int(index) == depth:
        return f"{prefix}actor/mean_net/{leaf}"
    net = "value_net" if part == "critic" else "actor_net"
    return f"{prefix}{part}/{net}/{'Dense' if kind == 'layers' else 'LayerNorm'}_{index}/{leaf}"


class Original:
    """Two updates of the original, the first without its actor."""

    def __init__(self) -> None:
        with np.load(Path(__file__).parents[1] / "parity" / "rebrac.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "config_json"}

    def of(self, group: str, agent: ReBRAC) -> dict[str, Tensor]:
        """What the group has, by our names; kernels of single networks are (in, out) there."""
        found = {}
        for name, parameter in agent.named_parameters():
            value = self.arrays.get(f"{group}/{theirs(name)}")
            if value is not None:
                value = value.mT if name.startswith("actor") and value.ndim == 2 else value
                found[name] = value.reshape(parameter.shape).clone()
        return found

    def inputs(self, prefix: str = "") -> tuple[Batch, SmoothingNoise]:
        columns = {key: self.arrays[f"{prefix}batch/{key}"] for key in Batch._fields if f"batch/{key}" in self.arrays}
        discounts = 0.99 * self.arrays[f"{prefix}batch/masks"]
        return Batch(**columns, discounts=discounts), SmoothingNoise(self.arrays[f"{prefix}noise/z_next"])


def load(agent: ReBRAC, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def test_two_updates_agree_with_the_original() -> None:
    shape: dict[str, Any] = {"hidden": (32, 32, 32), "activation": "gelu_tanh"}
    agent = ReBRAC(
        Spec(7, 3),
        partial(Critic, **shape),
        partial(TanhActor, **shape),
        partial(Adam, lr=3e-4),
        actor_weight=0.1,
        critic_weight=0.03,
    )
    original = Original()
    load(agent, original.of("params", agent))
    moments = original.of("adam/mu", agent), original.of("adam/nu", agent)
    optimizer = agent.configure_optimizers()
    for name, parameter in agent.named_parameters():
        if parameter.requires_grad:
            mu, nu = (of[name] for of in moments)
            optimizer.state[parameter] = {"step": torch.tensor(20.0), "exp_avg": mu, "exp_avg_sq": nu}

    for number, prefix in ((20, ""), (21, "second/")):
        agent.begin_update(number)
        batch, noise = original.inputs(prefix)
        losses = list(agent.losses(batch, noise))
        optimizer.zero_grad()
        torch.stack([loss for _, loss, _ in losses]).sum().backward()
        _check_metrics(original, prefix, {part: metrics for part, _, metrics in losses})
        gradients = original.of(f"{prefix}grads", agent)
        for name, parameter in agent.named_parameters():
            if agent.trains(name.partition(".")[0]) and parameter.requires_grad:
                error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
                assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()
        after = original.of(f"{prefix}params_after", agent)
        for name, parameter in agent.named_parameters():
            if name.startswith("actor.online") and not prefix:  # moved there by Adam's momentum alone: difference 1
                assert (parameter - after[name]).abs().max() < 5e-4
                _drift(optimizer, parameter, after[name])
                continue
            torch.testing.assert_close(parameter.detach(), after[name], rtol=0, atol=1e-5, msg=name)


def _check_metrics(original: Original, prefix: str, metrics: dict[str, Any]) -> None:
    pairs = {"critic/critic_loss": ("critic", "loss"), "critic/q_mean": ("critic", "q_mean")}
    if "actor" in metrics:
        pairs["actor/total_loss"] = ("actor", "loss")
    for key, (part, name) in pairs.items():
        expected = original.arrays[f"{prefix}expected/{key}"]
        torch.testing.assert_close(metrics[part][name], expected, rtol=1e-4, atol=1e-6, msg=key)


def _drift(optimizer: Any, parameter: Tensor, after: Tensor) -> None:
    """Bring a parameter where a step with a zero gradient takes it in the original."""
    with torch.no_grad():
        parameter.copy_(after)
    state = optimizer.state[parameter]
    state["step"] += 1
    state["exp_avg"] *= 0.9
    state["exp_avg_sq"] *= 0.999


def test_actions_agree_with_the_original() -> None:
    shape: dict[str, Any] = {"hidden": (32, 32, 32), "activation": "gelu_tanh"}
    agent = ReBRAC(Spec(7, 3), partial(Critic, **shape), partial(TanhActor, **shape), partial(Adam, lr=3e-4))
    original = Original()
    load(agent, original.of("params", agent))
    observations, z = original.arrays["act/observations"], original.arrays["act/noise/z"]
    torch.testing.assert_close(agent.act(observations, z), original.arrays["act/actions_temperature_0"])
    torch.testing.assert_close(agent.explore(observations, z), original.arrays["act/actions"])
