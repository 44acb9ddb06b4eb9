"""What every agent must pass: shapes, bounds, determinism, that each loss moves exactly its own parameters, and that
what the report shows is there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from deflow.agents.algorithm import Loss
from deflow.agents.base import Agent
from deflow.types import Batch, Spec

# Every kind of agent that an update can be of, as overrides; tests of all of them add what concerns them.
EVERY_KIND = [
    "agent=deflow",
    "agent=deflow solver=rk4 agent.refiner.objective=gradient_step",
    "agent=fql",
    "agent=fql agent/critic=occupancy",
    "agent=deflow agent/dynamics=gaussian agent.dynamics.expansion=1 agent.refiner.objective=unrolled",
    "agent=ifql",
    "agent=fawac",
    "agent=flow_bc",
    "agent=cal_ql agent.target_gap=0.8",
    "agent=rlpd agent.critic.rho=0.5",
    "agent=rebrac",
    "agent=iql",
    "agent=idql agent.behavior.width=8",
    "agent=srpo agent.behavior.width=8",
    "agent=cac",
]


class Acting(Agent):
    """Of an agent only what acts: a test writes `act`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, {"part": nn.Linear(1, 1)}, partial(torch.optim.Adam, lr=1e-3), seed=0)

    def losses(self, batch: Batch, noise: Any) -> Iterator[Loss]:
        yield from ()


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
    path = torch.randn(size, agent.spec.horizon, agent.spec.observation_dim, generator=generator)
    batch = Batch(observations, actions, rewards, discounts, next_observations, next_actions, returns=returns)
    return batch._replace(path=path if agent.traits.reads_path else None)


def loss_of(agent: Agent, part: str, batch: Batch, noise: Any) -> Loss:
    """What `losses` says of one part."""
    return next(loss for loss in agent.losses(batch, noise) if loss[0] == part)


def squared_targets(agent: Any, batch: Batch, noise: Any) -> torch.Tensor:
    """The temporal-difference loss of a critic that gives 0 everywhere: the mean square of the targets, a scalar."""
    with torch.no_grad():
        for parameter in agent.critic.online.parameters():
            parameter.zero_()
    return loss_of(agent, "critic", batch, noise)[1].detach()


def check_agent(agent: Agent) -> None:
    """The shared checks."""
    parts = tuple(agent._trainable)
    batch = random_batch(agent)
    noise = agent.draw_noise(batch, torch.Generator().manual_seed(1))
    assert isinstance(noise, tuple), "several seeds' noise is stacked, see `Agent.draw_noise`"

    for part in parts:  # alone, in a stage of its own
        agent.begin_stage("test", (part,), first_step=0)
        agent.zero_grad()
        losses = list(agent.losses(batch, noise))
        assert [name for name, _, _ in losses] == [part]
        _, loss, metrics = losses[0]
        assert metrics["loss"] == loss, f"{part} logs another loss than it minimises"
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
    losses = list(agent.losses(batch, noise))
    sum(loss for _, loss, _ in losses).backward()
    _check_gradients(agent, set(parts))
    _check_shown(agent, {f"{part}/{name}" for part, _, metrics in losses for name in metrics})

    z = agent.draw_act_noise(16, torch.Generator().manual_seed(0))
    for decide in (agent.act, agent.explore):
        actions = decide(batch.observations, z)
        assert actions.shape == (16, agent.spec.action_dim)
        assert actions.abs().max() <= 1
        assert torch.equal(actions, decide(batch.observations, z))
    proposals, values = agent.propose(batch.observations, z), agent.action_values(batch.observations, actions)
    assert proposals is None or proposals.shape == actions.shape
    assert values is None or values.shape == (16,)


def _check_shown(agent: Agent, metrics: set[str]) -> None:
    """Whether what the progress bar and the report show is among the metrics."""
    assert set(agent.headline.values()) <= metrics
    for panel in agent.panels():
        unknown = {curve.partition("/")[2] for curve in panel.curves} - metrics
        assert not unknown, f"the panel '{panel.title}' shows {unknown}, which no loss gives"


def _check_gradients(agent: Agent, moved: set[str]) -> None:
    own = {id(p): part for part, parameters in agent._trainable.items() for p in parameters}
    for name, parameter in agent.named_parameters():
        if own.get(id(parameter)) in moved:
            assert parameter.grad is not None, f"{name} gets no gradient from its own loss"
            assert parameter.grad.any(), f"{name} gets a gradient of zeros from its own loss"
        else:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} is moved by another part's loss"
