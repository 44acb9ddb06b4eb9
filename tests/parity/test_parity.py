"""One update of DeFlow and of FQL against the original implementations: losses, gradients and the weights after it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deflow.agents.base import Agent
from deflow.agents.deflow import DeFlow
from deflow.agents.fql import FQL
from deflow.agents.noise import FlowNoise
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import Critic
from deflow.modules.one_step import OneStepActor
from deflow.modules.refiner import Refiner
from deflow.types import Batch, Spec
from tests.parity.reference import Reference

LOSS_RTOL = 1e-4
WEIGHT_ATOL = 1e-5
# A target moves by tau times a distance: had it followed the step of up to lr, it would be tau * lr = 1.5e-6 further.
TARGET_ATOL = 2e-7
BF16_RTOL = 2e-2
BF16_ROUNDING = 2**-8  # of one value; in a mean of both signs it stays where the values cancel
MEANS = ("q", "q_mean", "value_loss")
BF16_GRADIENT_RTOL = 4e-2  # of a part: 32-wide bfloat16 layers; the refiner's passes through the critic's too
SHAPE: dict[str, Any] = {"hidden": (32, 32, 32), "activation": "gelu_tanh"}

# The original's name of a diagnostic -> ours, as (part, metric).
COMMON = {
    "actor/bc_flow_loss": ("behavior_flow", "loss"),
    "critic/critic_loss": ("critic", "loss"),
    "critic/q_mean": ("critic", "q_mean"),
    "critic/q_min": ("critic", "q_min"),
    "critic/q_max": ("critic", "q_max"),
}
DIAGNOSTICS = {
    DeFlow: {
        "actor/q_loss": ("refiner", "value_loss"),
        "actor/alpha_loss": ("refiner", "trust_region/multiplier_loss"),
        "actor/alpha_value": ("refiner", "trust_region/multiplier"),
        "actor/distill_loss": ("refiner", "trust_region/cost"),
        "actor/q": ("refiner", "q"),
    },
    FQL: {"actor/q_loss": ("actor", "value_loss"), "actor/distill_loss": ("actor", "distillation")},
}

Case = tuple[Reference, Agent, Batch, FlowNoise]


def build(name: str, spec: Spec) -> Agent:
    algorithm, aggregate = name.split("_")
    common: dict[str, Any] = {
        "behavior_flow": partial(BehaviorFlow, **SHAPE),
        "critic": partial(Critic, **SHAPE, aggregate=aggregate),
        "optimizer": partial(torch.optim.Adam, lr=3e-4),
    }
    if algorithm == "fql":
        return FQL(spec, actor=partial(OneStepActor, **SHAPE, alpha=3.0), **common)
    return DeFlow(spec, refiner=partial(Refiner, **SHAPE), trust_region=0.01, **common)


@pytest.fixture(params=["deflow_mean", "deflow_min", "fql_mean"])
def case(request: pytest.FixtureRequest) -> Case:
    reference = Reference(request.param)
    agent = build(request.param, Spec(reference["batch/observations"].shape[1], 3))
    weights = reference.of("params", agent)
    assert set(weights) == set(dict(agent.named_parameters()))
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            parameter.copy_(weights[name])
    columns = {key: reference[f"batch/{key}"] for key in ("observations", "actions", "rewards", "next_observations")}
    discounts = 0.99 * reference["batch/masks"]
    batch = Batch(**columns, discounts=discounts, next_actions=torch.full_like(columns["actions"], torch.nan))
    noise = FlowNoise(*(reference[f"noise/{key}"] for key in ("x_0", "t", "z", "z_next")))
    return reference, agent, batch, noise


def total_loss(agent: Agent, batch: Batch, noise: FlowNoise) -> Tensor:
    return torch.stack([loss for _, loss, _ in agent.losses(batch, noise)]).sum()


def test_losses_and_diagnostics_agree(case: Case) -> None:
    reference, agent, batch, noise = case
    metrics = {part: values for part, _, values in agent.losses(batch, noise)}
    for theirs, (part, key) in (COMMON | DIAGNOSTICS[type(agent)]).items():
        expected = reference[f"expected/{theirs}"]
        torch.testing.assert_close(metrics[part][key], expected, rtol=LOSS_RTOL, atol=1e-6, msg=theirs)
    torch.testing.assert_close(
        total_loss(agent, batch, noise).detach(), reference["expected/total_loss"], rtol=LOSS_RTOL, atol=1e-6
    )


def test_proposals_agree(case: Case) -> None:
    reference, agent, batch, noise = case
    proposals = agent.behavior_flow.propose(batch.observations, noise.z)
    torch.testing.assert_close(proposals, reference["expected/base_actions"], rtol=LOSS_RTOL, atol=1e-5)


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
        assert error < LOSS_RTOL, f"{name}: relative gradient error {error:.1e}"


def test_mixed_precision_agrees_to_its_own_accuracy(case: Case) -> None:
    reference, agent, batch, noise = case
    with torch.autocast("cpu", torch.bfloat16):
        losses = list(agent.losses(batch, noise))
    metrics = {part: values for part, _, values in losses}
    largest = max(abs(float(reference[f"expected/critic/{end}"])) for end in ("q_min", "q_max"))
    for theirs, (part, key) in (COMMON | DIAGNOSTICS[type(agent)]).items():
        value = metrics[part][key]
        assert value.dtype == torch.float32, key
        atol = BF16_ROUNDING * largest if key in MEANS else 0.0
        torch.testing.assert_close(value, reference[f"expected/{theirs}"], rtol=BF16_RTOL, atol=atol, msg=theirs)
    torch.stack([loss for _, loss, _ in losses]).sum().backward()
    expected = reference.of("grads", agent)
    for part in agent.parts:
        names = [name for name, p in agent.named_parameters() if name.startswith(f"{part}.") and p.requires_grad]
        gradient = torch.cat([agent.get_parameter(name).grad.flatten() for name in names])
        pinned = torch.cat([expected[name].flatten() for name in names])
        error = (gradient - pinned).norm() / pinned.norm()
        assert error < BF16_GRADIENT_RTOL, f"{part}: relative gradient error {error:.1e}"


@pytest.mark.parametrize("fused", [False, True])
def test_weights_after_the_update_agree(case: Case, fused: bool) -> None:
    reference, agent, batch, noise = case
    agent._make_optimizer = partial(torch.optim.Adam, lr=3e-4, fused=fused)
    optimizer = agent.configure_optimizers()
    mu, nu = reference.of("adam/mu", agent), reference.of("adam/nu", agent)
    for name, parameter in agent.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": reference["adam/count"].float(),
                "exp_avg": mu[name].clone(),
                "exp_avg_sq": nu[name].clone(),
            }
    total_loss(agent, batch, noise).backward()
    agent.on_before_optimizer_step(optimizer)
    optimizer.step()
    expected = reference.of("params_after", agent)
    for name, parameter in agent.named_parameters():
        atol = TARGET_ATOL if name.startswith("critic.target") else WEIGHT_ATOL
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=atol, msg=name)
