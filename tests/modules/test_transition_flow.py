"""Models of the environment's steps: systems whose next state is known in closed form, shapes, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deflow.errors import UserError
from deflow.flow.ode import Solver
from deflow.modules.statistics import StepStatistics
from deflow.modules.transition_flow import TransitionFlow, TransitionGaussian, TransitionModel
from deflow.types import Batch, Spec

SPEC = Spec(2, 1)
A, B = torch.tensor([[1.0, 0.2], [0.0, 0.9]]), torch.tensor([[0.0], [0.5]])
NOISE = torch.tensor([0.1, 0.3])  # standard deviations of a step of the linear system
UNIT: StepStatistics = {
    "observation_mean": [0.0],
    "observation_std": [1.0],
    "change_mean": [0.0],
    "change_std": [0.5],
    "reward_centre": -0.5,
    "reward_scale": 0.5,
}


def linear_batch(generator: torch.Generator, noise: Tensor = NOISE, size: int = 256) -> Batch:
    r"""Steps of :math:`s' = A s + B a + \epsilon`; right of 0 the reward is 0 and the task ends, else it is -1."""
    states = torch.randn(size, 2, generator=generator)
    actions = torch.rand(size, 1, generator=generator) * 2 - 1
    next_states = states @ A.T + actions @ B.T + noise * torch.randn(size, 2, generator=generator)
    ends = states[:, 0] > 0
    return Batch(states, actions, ends.float() - 1, 0.99 * (~ends).float(), next_states, actions)


def trained(model: TransitionModel, noise: Tensor = NOISE, updates: int = 400) -> TransitionModel:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        batch = linear_batch(generator, noise)
        x_0 = torch.randn(256, model.outcome_dim, generator=generator)
        loss, _ = model.loss(batch, x_0, torch.rand(256, 1, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return model


def make(kind: str, **settings: Any) -> TransitionModel:
    torch.manual_seed(0)
    makes: dict[str, type[Any]] = {"flow": TransitionFlow, "gaussian": TransitionGaussian}
    return makes[kind](SPEC, statistics=UNIT, hidden=(32, 32), activation="silu", **settings)


def moments(model: TransitionModel, way: str) -> tuple[Tensor, Tensor]:
    """Errors of the mean and of the standard deviation of the next state, at 5 states and actions."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(5, 2, generator=generator)
    actions = torch.rand(5, 1, generator=generator) * 2 - 1
    z = torch.randn(5 * 400, model.outcome_dim, generator=generator)
    drawn = model.samplers()[way](states.repeat_interleave(400, 0), actions.repeat_interleave(400, 0), z)
    next_states = drawn.observations.unflatten(0, (5, 400))
    expected = states @ A.T + actions @ B.T
    return (next_states.mean(1) - expected).abs(), next_states.std(1)


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_a_linear_system_with_gaussian_noise(kind: str) -> None:
    model = trained(make(kind))
    error, deviation = moments(model, "sample")
    assert error.mean() < 0.05  # of states of deviation 1
    torch.testing.assert_close(deviation.mean(0), NOISE, rtol=0.25, atol=0)
    if isinstance(model, TransitionGaussian):
        batch = linear_batch(torch.Generator().manual_seed(3))
        mean = model.sample(batch.observations, batch.actions, torch.zeros(256, model.outcome_dim)).observations
        assert (mean - batch.observations @ A.T - batch.actions @ B.T).abs().mean() < 0.05


def test_a_deterministic_system_and_the_one_step_copy() -> None:
    model = trained(make("flow", one_step=True, solver=Solver(steps=5)), noise=torch.zeros(2), updates=600)
    assert isinstance(model, TransitionFlow)
    for way in ("sample", "one_step"):
        error, deviation = moments(model, way)
        assert error.mean() < 0.05, way
        assert deviation.mean() < 0.08, way
    batch = linear_batch(torch.Generator().manual_seed(3))
    z = torch.randn(256, model.outcome_dim, generator=torch.Generator().manual_seed(4))
    outcome = model.sample(batch.observations, batch.actions, z)
    certain = batch.observations[:, 0].abs() > 0.2
    assert (outcome.continues == (batch.discounts > 0))[certain].float().mean() > 0.9
    assert (outcome.rewards - batch.rewards)[certain].abs().mean() < 0.2  # where it jumps by 1


def test_a_flow_has_both_outcomes_of_a_coin_and_a_gaussian_what_lies_between() -> None:
    between = {}
    for kind in ("flow", "gaussian"):
        model = make(kind)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(400):
            batch = linear_batch(generator)
            coins = torch.randint(2, (256, 2), generator=generator) * 2.0 - 1  # s' is s - 1 or s + 1, whatever a is
            x_0 = torch.randn(256, model.outcome_dim, generator=generator)
            times = torch.rand(256, 1, generator=generator)
            loss, _ = model.loss(batch._replace(next_observations=batch.observations + coins), x_0, times)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        batch = linear_batch(generator, size=1000)
        z = torch.randn(1000, model.outcome_dim, generator=generator)
        changes = model.sample(batch.observations, batch.actions, z).observations - batch.observations
        between[kind] = (changes.abs() < 0.5).float().mean().item()
    assert between["flow"] < 0.2
    assert between["gaussian"] == pytest.approx(0.38, abs=0.05)  # a normal distribution of deviation 1


def test_a_gaussians_density() -> None:
    model, batch = make("gaussian"), linear_batch(torch.Generator().manual_seed(0), size=4)
    assert isinstance(model, TransitionGaussian)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.net.layers[-1].bias[4:] = math.log(math.e**0.5 - 1)  # a logarithm that the bounds leave between them
        low, high = model.log_std_range
        _, log_std = model._moments(batch.observations, batch.actions)
        assert low < log_std.min() <= log_std.max() < high
        expected = torch.distributions.Normal(0.0, log_std.exp()).log_prob(model.outcomes_of(batch)).sum(-1)
        torch.testing.assert_close(model.log_prob(batch), expected)


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_shapes_and_the_inverse(kind: str) -> None:
    model, batch = make(kind), linear_batch(torch.Generator().manual_seed(0), size=8)
    outcome = model.sample(batch.observations, batch.actions, torch.randn(8, 4))
    assert [tuple(column.shape) for column in outcome] == [(8, 2), (8,), (8,)]
    assert set(outcome.continues.tolist()) <= {0.0, 1.0}
    assert model.outcomes_of(batch).shape == (8, model.outcome_dim)
    back = model._outcome(batch.observations, model.outcomes_of(batch))
    torch.testing.assert_close(back.observations, batch.next_observations)
    torch.testing.assert_close(back.rewards, batch.rewards)
    assert torch.equal(back.continues, (batch.discounts > 0).float())


def test_an_average_stands_in_for_a_flow_at_rest() -> None:
    model = cast(TransitionFlow, make("flow", ema=0.9))
    drawn = linear_batch(torch.Generator().manual_seed(0), size=4)
    sample = partial(model.sample, drawn.observations, drawn.actions, torch.zeros(4, 4))
    before = sample()
    with torch.no_grad():
        for online, average, share in model.target_pairs():
            online.add_(1.0)
            assert share == pytest.approx(0.1)
            assert not average.requires_grad
    assert not torch.equal(sample().observations, before.observations)
    model.eval()
    assert torch.equal(sample().observations, before.observations)


def test_a_copy_learns_from_the_average() -> None:
    model = cast(TransitionFlow, make("flow", one_step=True, ema=0.9))
    assert model.average.network is not None
    with torch.no_grad():
        for parameter in model.average.network.parameters():
            parameter.zero_()  # under which noise stays what it is
    batch = linear_batch(torch.Generator().manual_seed(0), size=4)
    x_0 = torch.randn(len(batch.rewards), model.outcome_dim)
    _, metrics = model.loss(batch, x_0, torch.rand(len(x_0), 1))
    assert model.one_step is not None
    copied = model.one_step(model._inputs(batch.observations, batch.actions), x_0)
    torch.testing.assert_close(metrics["distillation"], (copied - x_0).square().mean().detach())


def test_statistics_are_buffers() -> None:
    state = make("flow").state_dict()
    assert set(UNIT) <= set(state)
    assert state["change_std"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "spec,statistics,message",
    [
        (Spec(0, 1, image=(1, 64, 64, 3)), UNIT, "not images"),
        (Spec(2, 4, horizon=4), UNIT, "single steps"),
        (Spec(3, 1), UNIT | {"change_std": [1.0, 1.0]}, "change_std needs 3 numbers, got 2"),
    ],
)
def test_what_is_refused(spec: Spec, statistics: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransitionFlow(spec, statistics, hidden=(8,))


def test_without_a_copy_there_is_none_to_sample() -> None:
    model = make("flow")
    assert isinstance(model, TransitionFlow)
    with pytest.raises(UserError, match="one_step=true"):
        model.sample_at_once(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 4))
    with pytest.raises(UserError, match="lowest, highest"):
        make("gaussian", log_std_range=(1.0, 0.0))
