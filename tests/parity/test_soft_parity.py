"""One update of RLPD against FQL's `sac` and QAM's `rlpd`: losses, gradients, the weights after it, and actions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deflow.agents.rlpd import RLPD, SoftNoise
from deflow.modules.critic import Critic
from deflow.modules.gaussian import GaussianActor
from deflow.types import Batch, Spec
from tests.parity.reference import Reference

RTOL = 1e-4
WEIGHT_ATOL, SHARE_OF_UPDATE = 1e-5, 0.05  # the smaller of the two holds, for the largest error in a tensor
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


class Original(NamedTuple):
    """What a fixture's networks are called, and the settings with which it was made."""

    hidden: str
    heads: tuple[str, str]
    critic: dict[str, Any]
    actor: dict[str, Any]


ORIGINALS = {
    "sac": Original("actor_net", ("mean_net", "log_std_net"), {"aggregate": "min"}, {"log_std_range": (-5, 2)}),
    "rlpd_qam": Original(
        "MLP_0",
        ("OutputDenseMean", "OutputDenseLogStd"),
        {"members": 4, "rho": 0.5},
        {"log_std_range": (-20, 2)},
    ),
}


class SoftReference(Reference):
    """A fixture with a Gaussian actor, whose mean and log std are networks of their own there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.original = ORIGINALS[name]

    def keys(self, name: str) -> list[str]:
        if not name.startswith("actor."):
            return super().keys(name)
        if name == "actor.log_temperature":
            return ["alpha/log_value"]
        index, tensor = name.removeprefix("actor.net.layers.").split(".")
        leaf = "bias" if tensor == "bias" else "kernel"
        last = [f"actor/{head}/{leaf}" for head in self.original.heads]
        return last if index == DEPTH else [f"actor/{self.original.hidden}/Dense_{index}/{leaf}"]


Case = tuple[SoftReference, RLPD, Batch, SoftNoise]


@pytest.fixture(params=list(ORIGINALS))
def case(request: pytest.FixtureRequest) -> Case:
    reference = SoftReference(request.param)
    agent = RLPD(
        SPEC,
        partial(Critic, **SHAPE, **reference.original.critic),
        partial(GaussianActor, **SHAPE, **reference.original.actor, temperature_loss="alpha"),
        partial(torch.optim.Adam, lr=3e-4),
    )
    weights = reference.of("params", agent)
    assert set(weights) == set(dict(agent.named_parameters()))
    agent.load_state_dict(weights)
    columns = {key: reference[f"batch/{key}"] for key in ("observations", "actions", "rewards", "next_observations")}
    discounts = 0.99 * reference["batch/masks"]
    batch = Batch(**columns, discounts=discounts, next_actions=torch.full_like(columns["actions"], torch.nan))
    members = torch.arange(agent.critic.online.members)
    return reference, agent, batch, SoftNoise(reference["noise/z"], reference["noise/z_next"], members)


def total_loss(agent: RLPD, batch: Batch, noise: SoftNoise) -> Tensor:
    return torch.stack([loss for _, loss, _ in agent.losses(batch, noise)]).sum()


def test_losses_and_diagnostics_agree(case: Case) -> None:
    reference, agent, batch, noise = case
    metrics = {part: values for part, _, values in agent.losses(batch, noise)}
    for theirs, (part, key) in DIAGNOSTICS.items():
        torch.testing.assert_close(metrics[part][key], reference[f"expected/{theirs}"], rtol=RTOL, atol=0, msg=theirs)
    total = total_loss(agent, batch, noise).detach()
    torch.testing.assert_close(total, reference["expected/total_loss"], rtol=RTOL, atol=0)


def test_gradients_agree(case: Case) -> None:
    reference, agent, batch, noise = case
    total_loss(agent, batch, noise).backward()
    expected = reference.of("grads", agent)
    for name, parameter in agent.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < RTOL, f"{name}: relative gradient error {error:.1e}"


def test_weights_after_the_update_agree(case: Case) -> None:
    reference, agent, batch, noise = case
    optimizer = agent.configure_optimizers()
    before, mu, nu = (reference.of(group, agent) for group in ("params", "adam/mu", "adam/nu"))
    for name, parameter in agent.named_parameters():
        if parameter.requires_grad:
            step = reference["adam/count"].float()
            optimizer.state[parameter] = {"step": step, "exp_avg": mu[name].clone(), "exp_avg_sq": nu[name].clone()}
    total_loss(agent, batch, noise).backward()
    agent.on_before_optimizer_step(optimizer)
    optimizer.step()
    expected = reference.of("params_after", agent)
    for name, parameter in agent.named_parameters():
        update = float((expected[name] - before[name]).abs().max())
        error = float((parameter.detach() - expected[name]).abs().max())
        assert error < min(WEIGHT_ATOL, SHARE_OF_UPDATE * update), f"{name}: {error:.1e} of an update of {update:.1e}"


def test_actions_agree(case: Case) -> None:
    reference, agent, _, _ = case
    observations, z = reference["act/observations"], reference["act/noise/z"]
    torch.testing.assert_close(agent.explore(observations, z), reference["act/actions"])
    if "act/actions_temperature_0" in reference.arrays:  # QAM's has no temperature
        torch.testing.assert_close(agent.act(observations, z), reference["act/actions_temperature_0"])
