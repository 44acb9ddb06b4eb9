"""What every agent must pass: shapes, bounds, determinism, and that each loss moves exactly its own parameters."""

from __future__ import annotations

import torch

from deflow.agents.base import Agent
from deflow.types import Batch


def random_batch(agent: Agent, size: int = 16, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, size, *agent.spec.observation_shape)
    if agent.spec.image is None:
        observations, next_observations = torch.randn(shape, generator=generator)
    else:
        observations, next_observations = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    actions = torch.rand(size, agent.spec.action_dim, generator=generator) * 2 - 1
    discounts = 0.99 * (torch.arange(size) % 4 != 0)
    rewards, returns = torch.randn(2, size, generator=generator)
    next_actions = torch.rand(size, agent.spec.action_dim, generator=generator) * 2 - 1
    return Batch(observations, actions, rewards, discounts, next_observations, next_actions, returns=returns)


def check_agent(agent: Agent) -> None:
    """The shared checks."""
    parts = tuple(agent._trainable)
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(1))

    for part in parts:  # alone, in a stage of its own
        agent.begin_stage("test", (part,), first_step=0)
        agent.zero_grad()
        losses = list(agent.losses(batch, noise))
        assert [name for name, _, _ in losses] == [part]
        _, loss, metrics = losses[0]
        assert "loss" in metrics
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())
        loss.backward()
        _check_gradients(agent, {part})

    agent.begin_stage("test", parts, first_step=0)
    for part in parts:  # one term of the sum, with everything trainable
        agent.zero_grad()
        next(loss for name, loss, _ in agent.losses(batch, noise) if name == part).backward()
        _check_gradients(agent, {part})

    agent.zero_grad()
    sum(loss for _, loss, _ in agent.losses(batch, noise)).backward()
    _check_gradients(agent, set(parts))

    z = torch.randn(16, agent.candidates, agent.spec.action_dim)
    actions = agent.act(batch.observations, z)
    assert actions.shape == (16, agent.spec.action_dim)
    assert actions.abs().max() <= 1
    assert torch.equal(actions, agent.act(batch.observations, z))


def _check_gradients(agent: Agent, moved: set[str]) -> None:
    own = {id(p): part for part, parameters in agent._trainable.items() for p in parameters}
    for name, parameter in agent.named_parameters():
        if own.get(id(parameter)) in moved:
            assert parameter.grad is not None, f"{name} gets no gradient from its own loss"
        else:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} is moved by another part's loss"
