"""One update of DeFlow against the original implementation: losses, gradients and the weights after it.

The fixtures hold weights, Adam's state, a batch and every noise draw of one update of the authors' released code
(32-wide networks, tanh GELU), taken after 20 warm-up updates.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deflow.agents.deflow import DeFlow, DeFlowNoise
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.critic import Critic
from deflow.modules.refiner import Refiner
from deflow.types import Batch, Spec

LOSS_RTOL = 1e-4
WEIGHT_ATOL = 1e-5


class Reference:
    """The fixture's arrays, and where each of our parameters is among them."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).parent / f"{name}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def of(self, group: str, agent: DeFlow) -> dict[str, Tensor]:
        """The arrays of `group` (params, grads, ...) by our parameter names."""
        nets = {
            "behavior_flow.field.mlp.": "actor_bc_flow/mlp",
            "refiner.net.": "refine_onestep_flow/mlp",
            "critic.online.": "critic/value_net",
            "critic.target.": "target_critic/value_net",
        }
        found = {"refiner.constraints.trust_region.log_multiplier": self[f"{group}/log_alpha/value"].squeeze()}
        for name, parameter in agent.named_parameters():
            for prefix, net in nets.items():
                if not name.startswith(prefix):
                    continue
                key = f"{group}/{net}/{self._layer(name.removeprefix(prefix))}"
                if key in self.arrays:
                    value = self[key]
                    if not prefix.startswith("critic"):
                        value = value.mT if value.ndim == 2 else value  # torch keeps kernels as (out, in)
                    found[name] = value.reshape(parameter.shape).contiguous()
        return found

    @staticmethod
    def _layer(name: str) -> str:
        kind, index, tensor = name.split(".")
        dense = kind == "layers"
        leaf = "bias" if tensor == "bias" else ("kernel" if dense else "scale")
        return f"{'Dense' if dense else 'LayerNorm'}_{index}/{leaf}"


def build(reference: Reference, aggregate: str) -> DeFlow:
    spec = Spec(observation_dim=reference["batch/observations"].shape[1], action_dim=3)
    shape = {"hidden": (32, 32, 32), "activation": "gelu_tanh"}
    agent = DeFlow(
        spec,
        behavior_flow=partial(BehaviorFlow, **shape),
        critic=partial(Critic, **shape, aggregate=aggregate),
        refiner=partial(Refiner, **shape),
        optimizer=partial(torch.optim.Adam, lr=3e-4),
        trust_region=0.01,
    )
    weights = reference.of("params", agent)
    assert set(weights) == set(dict(agent.named_parameters()))
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            parameter.copy_(weights[name])
    return agent


def restore_adam(agent: DeFlow, optimizer: torch.optim.Optimizer, reference: Reference) -> None:
    mu, nu = reference.of("adam/mu", agent), reference.of("adam/nu", agent)
    for name, parameter in agent.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": reference["adam/count"].float(),
                "exp_avg": mu[name].clone(),
                "exp_avg_sq": nu[name].clone(),
            }


@pytest.fixture(params=["mean", "min"])
def case(request: pytest.FixtureRequest) -> tuple[Reference, DeFlow, Batch, DeFlowNoise]:
    reference = Reference(f"deflow_{request.param}")
    batch = Batch(*(reference[f"batch/{field}"] for field in Batch._fields[:5]))
    noise = DeFlowNoise(*(reference[f"noise/{key}"] for key in ("x_0", "t", "z", "z_next")))
    return reference, build(reference, request.param), batch, noise


def test_losses_and_diagnostics_agree(case) -> None:
    reference, agent, batch, noise = case
    losses = {part: (loss, metrics) for part, loss, metrics in agent.losses(batch, noise)}
    refiner, critic = losses["refiner"][1], losses["critic"][1]
    ours = {
        "actor/bc_flow_loss": losses["behavior_flow"][0],
        "critic/critic_loss": losses["critic"][0],
        "actor/q_loss": refiner["value_loss"],
        "actor/alpha_loss": refiner["trust_region/multiplier_loss"],
        "actor/alpha_value": refiner["trust_region/multiplier"],
        "actor/distill_loss": refiner["trust_region/cost"],
        "actor/q": refiner["q"],
        "critic/q_mean": critic["q_mean"],
        "critic/q_min": critic["q_min"],
        "critic/q_max": critic["q_max"],
        "total_loss": sum(loss for loss, _ in losses.values()),
    }
    for key, value in ours.items():
        torch.testing.assert_close(value.detach(), reference[f"expected/{key}"], rtol=LOSS_RTOL, atol=1e-6, msg=key)


def test_proposals_agree(case) -> None:
    reference, agent, batch, noise = case
    proposals = agent.behavior_flow.propose(batch.observations, noise.z)
    torch.testing.assert_close(proposals, reference["expected/base_actions"], rtol=LOSS_RTOL, atol=1e-5)


def test_gradients_agree(case) -> None:
    reference, agent, batch, noise = case
    torch.stack([loss for _, loss, _ in agent.losses(batch, noise)]).sum().backward()
    expected = reference.of("grads", agent)
    for name, parameter in agent.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < LOSS_RTOL, f"{name}: relative gradient error {error:.1e}"


@pytest.mark.parametrize("fused", [False, True])
def test_weights_after_the_update_agree(case, fused: bool) -> None:
    reference, agent, batch, noise = case
    agent._make_optimizer = partial(torch.optim.Adam, lr=3e-4, fused=fused)
    optimizer = agent.configure_optimizers()
    restore_adam(agent, optimizer, reference)
    torch.stack([loss for _, loss, _ in agent.losses(batch, noise)]).sum().backward()
    agent.on_before_optimizer_step(optimizer)
    optimizer.step()
    expected = reference.of("params_after", agent)
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=WEIGHT_ATOL, msg=name)
