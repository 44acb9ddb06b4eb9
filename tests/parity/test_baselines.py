"""One update of the baselines of FQL's table against their original code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deflow.agents.base import Agent
from deflow.agents.bc import BC, ImitationNoise
from deflow.agents.fawac import FAWAC
from deflow.agents.fbrac import FBRAC
from deflow.agents.ifql import IFQL
from deflow.agents.iql import IQL, IQLActor
from deflow.agents.noise import FlowNoise
from deflow.agents.rebrac import ReBRAC, SmoothingNoise, TanhActor
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import Critic
from deflow.modules.gaussian_policy import GaussianPolicy
from deflow.modules.value import MeanValue, Value
from deflow.types import Spec
from tests.parity.original import Original, fql_name

SPEC = Spec(7, 3)
SHAPE: dict[str, Any] = {"hidden": (32, 32, 32), "activation": "gelu_tanh"}
ADAM = partial(torch.optim.Adam, lr=3e-4)
NETWORKS = {
    "critic.online.": "critic/value_net",
    "critic.target.": "target_critic/value_net",
    "value.net.": "value/value_net",
}
NO_DROPOUT = ImitationNoise(None)


def iql_name(name: str) -> list[str]:
    if name.startswith("actor.net.layers.3"):
        return [f"actor/mean_net/{'bias' if name.endswith('bias') else 'kernel'}"]
    return fql_name(name, NETWORKS | {"actor.net.": "actor/actor_net"})


def iql(**actor: Any) -> IQL:
    critic = partial(Critic, **SHAPE, reduction="sum")
    return IQL(SPEC, critic, partial(Value, **SHAPE), partial(IQLActor, **SHAPE, **actor), ADAM)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("iql", {"alpha": 10.0}),
        ("iql_ddpgbc", {"alpha": 0.3, "extraction": "ddpgbc"}),
        ("bc_iql", {"alpha": 0.0}),
    ],
)
def test_iql(file: str, settings: dict[str, Any]) -> None:
    agent, original = iql(**settings), Original(file, iql_name)
    original.load(agent)
    metrics = check_implicit(agent, original, NO_DROPOUT, "actor")
    if "advantage" in metrics["actor"]:
        original.check("actor/adv", metrics["actor"]["advantage"])


def check_implicit(agent: Agent, original: Original, noise: Any, policy: str) -> dict[str, dict[str, Tensor]]:
    """An update of an agent with implicit values, from the losses to the weights, and how it acts; its metrics."""
    observations, z = original["act/observations"], original["act/noise/z"]
    acted, explored = agent.act(observations, z), agent.explore(observations, z)
    torch.testing.assert_close(acted, original["act/actions_temperature_0"], rtol=0, atol=1e-5)
    torch.testing.assert_close(explored, original["act/actions"], rtol=0, atol=1e-5)
    metrics = original.check_update(agent, noise)
    for key, (part, metric) in {
        "critic/critic_loss": ("critic", "loss"),
        "value/value_loss": ("value", "loss"),
        "value/v_mean": ("value", "v"),
        "actor/actor_loss": (policy, "loss"),
    }.items():
        original.check(key, metrics[part][metric])
    return metrics


def test_ifql() -> None:
    critic = partial(Critic, **SHAPE, reduction="sum")
    agent = IFQL(SPEC, partial(BehaviorFlow, **SHAPE), critic, partial(Value, **SHAPE), ADAM)
    networks = NETWORKS | {"behavior_flow.field.mlp.": "actor_flow/mlp"}
    original = Original("ifql", partial(fql_name, parts=networks))
    original.load(agent)
    x_0, times = original["noise/x_0"], original["noise/t"]
    check_implicit(agent, original, FlowNoise(x_0, times, x_0, x_0), "behavior_flow")


def test_behaviour_cloning_alone_is_the_same_policys_loss() -> None:
    agent = BC(SPEC, partial(GaussianPolicy, **SHAPE), ADAM)
    original = Original("bc_iql", iql_name)
    original.load(agent)
    metrics = original.check_update(agent, NO_DROPOUT)
    original.check("actor/actor_loss", metrics["actor"]["loss"])


def test_jaxrls_behaviour_cloning() -> None:
    def theirs(name: str) -> list[str]:
        index, tensor = name.removeprefix("actor.net.layers.").split(".")
        layer = "OutputDenseMean" if index == "3" else f"MLP_0/Dense_{index}"
        return [f"actor/{layer}/{'bias' if tensor == 'bias' else 'kernel'}"]

    policy = partial(GaussianPolicy, hidden=(32, 32, 32), activation="relu", std=0.1)
    agent, original = BC(SPEC, policy, partial(torch.optim.Adam, lr=1e-3)), Original("bc", theirs)
    original.load(agent)
    acted = agent.actor.mean(original["act/observations"])  # there not clipped
    torch.testing.assert_close(acted, original["act/actions"], rtol=1e-5, atol=1e-6)
    metrics = original.check_update(agent, NO_DROPOUT)
    original.check("nll", metrics["actor"]["loss"])


def flow_noise(original: Original) -> FlowNoise:
    """The draws of a file; those that it lacks are not read."""
    missing = torch.full_like(original["noise/x_0"], torch.nan)
    draws = (original.arrays.get(f"noise/{name}", missing) for name in ("x_0", "t", "z", "z_next"))
    return FlowNoise(*draws)


def test_fbrac() -> None:
    agent = FBRAC(SPEC, partial(BehaviorFlow, **SHAPE), partial(Critic, **SHAPE), ADAM, alpha=10.0, normalize_q=False)
    original = Original("fbrac", partial(fql_name, parts=NETWORKS | {"behavior_flow.field.mlp.": "actor_flow/mlp"}))
    original.load(agent)
    acted = agent.act(original["act/observations"], original["act/noise/z"])
    torch.testing.assert_close(acted, original["act/actions"], rtol=0, atol=1e-5)
    metrics = original.check_update(agent, flow_noise(original))
    original.check("actor/bc_flow_loss", metrics["behavior_flow"]["matching"])
    original.check("actor/q_loss", metrics["behavior_flow"]["value_loss"])
    original.check("critic/critic_loss", metrics["critic"]["loss"])


def test_qams_fbrac() -> None:
    # There alpha divides the value, here it multiplies the matching: the flow's loss and its moments are alpha times.
    alpha = 0.3
    critic = partial(Critic, **SHAPE, members=4, rho=0.5)
    agent = FBRAC(SPEC, partial(BehaviorFlow, **SHAPE), critic, ADAM, alpha=alpha, normalize_q=False)
    original = Original("fbrac_qam", partial(fql_name, parts=NETWORKS | {"behavior_flow.field.mlp.": "actor_flow/mlp"}))
    original.load(agent)
    acted = agent.act(original["act/observations"], original["act/noise/z"])
    torch.testing.assert_close(acted, original["act/actions"], rtol=0, atol=1e-5)
    for key in original.arrays:
        if "actor_flow" in key and key.startswith(("grads/", "adam/")):
            original.arrays[key] = original[key] * (alpha**2 if "/nu/" in key else alpha)
    metrics = original.check_update(agent, flow_noise(original))
    original.check("actor/bc_flow_loss", metrics["behavior_flow"]["matching"])
    value_loss = metrics["behavior_flow"]["value_loss"] / alpha
    original.check("actor/actor_loss", metrics["behavior_flow"]["matching"] + value_loss)
    original.check("critic/critic_loss", metrics["critic"]["loss"])


def test_qams_fawac() -> None:
    critic = partial(Critic, **SHAPE, members=4, rho=0.5)
    flow, value = partial(BehaviorFlow, **SHAPE), partial(MeanValue, **SHAPE)
    agent = FAWAC(SPEC, flow, critic, value, ADAM, alpha=0.8)
    original = Original("fawac", partial(fql_name, parts=NETWORKS | {"behavior_flow.field.mlp.": "actor/mlp"}))
    original.load(agent)
    acted = agent.act(original["act/observations"], original["act/noise/z"])
    torch.testing.assert_close(acted, original["act/actions"], rtol=0, atol=1e-5)
    metrics = original.check_update(agent, flow_noise(original))
    original.check("actor/actor_loss", metrics["behavior_flow"]["loss"])
    original.check("critic/critic_loss", metrics["critic"]["loss"])
    original.check("critic/value_loss", metrics["value"]["loss"])


def rebrac_name(name: str) -> list[str]:
    if ".layers.3." in name and name.startswith("actor"):
        prefix = "" if ".online." in name else "target_"
        return [f"{prefix}actor/mean_net/{'bias' if name.endswith('bias') else 'kernel'}"]
    actors = {"actor.online.": "actor/actor_net", "actor.target.": "target_actor/actor_net"}
    return fql_name(name, NETWORKS | actors)


def test_two_updates_of_rebrac() -> None:
    agent = ReBRAC(
        SPEC, partial(Critic, **SHAPE), partial(TanhActor, **SHAPE), ADAM, actor_weight=0.1, critic_weight=0.03
    )
    original = Original("rebrac", rebrac_name)
    original.load(agent)
    observations, z = original["act/observations"], original["act/noise/z"]
    torch.testing.assert_close(agent.act(observations, z), original["act/actions_temperature_0"], rtol=0, atol=1e-5)
    torch.testing.assert_close(agent.explore(observations, z), original["act/actions"], rtol=0, atol=1e-5)
    optimizer = original.optimizer(agent)
    for number, prefix in ((20, ""), (21, "second/")):  # the actor is due in the second alone
        agent.begin_update(number)
        noise = SmoothingNoise(original[f"{prefix}noise/z_next"])
        before = "params_after" if prefix else "params"
        metrics = original.check_update(agent, noise, optimizer, prefix=prefix, before=before)
        original.check("critic/critic_loss", metrics["critic"]["loss"], prefix)
        original.check("critic/q_mean", metrics["critic"]["q_mean"], prefix)
        if prefix:
            original.check("actor/total_loss", metrics["actor"]["loss"], prefix)
