"""One update of RLPD against FQL's `sac` and QAM's `rlpd`: losses, gradients, the weights after it, and actions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from deflow.agents.rlpd import RLPD, SoftNoise
from deflow.modules.critic import Critic
from deflow.modules.gaussian import GaussianActor
from deflow.types import Spec
from tests.parity.original import RTOL, Original, fql_name

SHAPE: dict[str, Any] = {"hidden": (32, 32, 32), "activation": "gelu_tanh"}
SPEC = Spec(7, 3)
DEPTH = "3"  # the number of our last layer, which gives mean and log std side by side
DIAGNOSTICS = {  # the original's -> ours, as (part, metric)
    "critic/critic_loss": ("critic", "loss"),
    "critic/q_mean": ("critic", "q_mean"),
    "critic/q_min": ("critic", "q_min"),
    "critic/q_max": ("critic", "q_max"),
    "actor/total_loss": ("actor", "loss"),
    "actor/q": ("actor", "q"),
    "actor/entropy": ("actor", "entropy"),
    "actor/alpha": ("actor", "temperature"),
}


class Settings(NamedTuple):
    """What a file's networks are called, and the settings with which it was made."""

    hidden: str
    heads: tuple[str, str]
    critic: dict[str, Any]
    actor: dict[str, Any]

    def theirs(self, name: str) -> list[str]:
        """The original's keys of one of our parameters; its mean and log std are networks of their own."""
        if not name.startswith("actor."):
            return fql_name(name, {"critic.online.": "critic/value_net", "critic.target.": "target_critic/value_net"})
        if name == "actor.log_temperature":
            return ["alpha/log_value"]
        index, tensor = name.removeprefix("actor.net.layers.").split(".")
        leaf = "bias" if tensor == "bias" else "kernel"
        last = [f"actor/{head}/{leaf}" for head in self.heads]
        return last if index == DEPTH else [f"actor/{self.hidden}/Dense_{index}/{leaf}"]


FILES = {
    "sac": Settings("actor_net", ("mean_net", "log_std_net"), {"aggregate": "min"}, {"log_std_range": (-5, 2)}),
    "rlpd_qam": Settings(
        "MLP_0",
        ("OutputDenseMean", "OutputDenseLogStd"),
        {"members": 4, "rho": 0.5},
        {"log_std_range": (-20, 2)},
    ),
}


@pytest.fixture(params=list(FILES))
def case(request: pytest.FixtureRequest) -> tuple[Original, RLPD]:
    settings = FILES[request.param]
    agent = RLPD(
        SPEC,
        partial(Critic, **SHAPE, **settings.critic),
        partial(GaussianActor, **SHAPE, **settings.actor, temperature_loss="alpha"),
        partial(torch.optim.Adam, lr=3e-4),
    )
    original = Original(request.param, settings.theirs)
    original.load(agent)
    return original, agent


def test_an_update_agrees(case: tuple[Original, RLPD]) -> None:
    original, agent = case
    members = torch.arange(agent.critic.online.members)
    metrics = original.check_update(agent, SoftNoise(original["noise/z"], original["noise/z_next"], members))
    for theirs, (part, key) in DIAGNOSTICS.items():
        torch.testing.assert_close(metrics[part][key], original[f"expected/{theirs}"], rtol=RTOL, atol=0, msg=theirs)
    total = metrics["critic"]["loss"] + metrics["actor"]["loss"]
    torch.testing.assert_close(total, original["expected/total_loss"], rtol=RTOL, atol=0)


def test_actions_agree(case: tuple[Original, RLPD]) -> None:
    original, agent = case
    observations, z = original["act/observations"], original["act/noise/z"]
    torch.testing.assert_close(agent.explore(observations, z), original["act/actions"])
    if "act/actions_temperature_0" in original.arrays:  # QAM's has no temperature
        torch.testing.assert_close(agent.act(observations, z), original["act/actions_temperature_0"])
