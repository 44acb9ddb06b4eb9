"""How diverse a trained policy is beside the data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deflow.agents.base import Agent
from deflow.data.iav import ActionVariance
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.seeding import torch_generator


def policy_variance(agent: Agent, states: Tensor, samples: int, seed: int) -> dict[str, ActionVariance]:
    """The variance of the policy's actions at a state, averaged over states, comparable to the data's IAV.

    Args:
        agent: the policy; a flow policy's proposals are measured too.
        states: shape (states, observation_dim).
        samples: actions drawn at each state, at least 2.
        seed: of the noise.

    Returns:
        `policy` (the actions taken) and, if the agent has a behaviour flow, `proposal`.
    """
    policies: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"policy": agent.act}
    if hasattr(agent, "behavior_flow"):
        flow: BehaviorFlow = agent.behavior_flow  # type: ignore[assignment]
        policies["proposal"] = lambda observations, z: flow.propose(observations, z[:, 0])
    return {name: _variance(agent, act, states, samples, seed) for name, act in policies.items()}


@torch.no_grad()
def _variance(
    agent: Agent, act: Callable[[Tensor, Tensor], Tensor], states: Tensor, samples: int, seed: int
) -> ActionVariance:
    generator = torch_generator(agent.device, seed, "diversity")
    variances = []
    for chunk in states.to(agent.device).split(256):
        z = torch.randn(
            len(chunk) * samples, agent.candidates, agent.spec.action_dim, generator=generator, device=agent.device
        )
        actions = act(chunk.repeat_interleave(samples, dim=0), z).reshape(len(chunk), samples, -1)
        variances.append(actions.float().var(dim=1).cpu().numpy())
    return ActionVariance.of_states(np.concatenate(variances), seed)
