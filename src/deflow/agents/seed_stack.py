"""SeedStack: several seeds of one agent, trained by one batched update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from deflow.agents.algorithm import Loss
from deflow.agents.base import ALMOST_0, Agent
from deflow.errors import UserError
from deflow.types import Batch, Columns, Metrics, stack

Moments = list[dict[str, Any] | None]  # an optimizer's state of each parameter of a part, where it has one
STEP = "step"  # the number in it that is no moment


class SeedStack(Agent):
    """Agents of the same kind, one a seed, each to become what it would have become alone.

    While a stage trains, the agents' parameters are views into stacked ones, with the seeds along the first axis: the
    losses of all are one `vmap`, the optimizer and the targets step the stacked tensors, and whatever plays or saves
    one of the agents sees its newest weights. Adam being per parameter, the seeds do not touch each other. Loss and
    metrics that are logged are means over the seeds.

    Args:
        agents: freshly made, alike but for their seeds.

    Raises:
        UserError: if torchdiffeq takes part in the agents' losses.
    """

    def __init__(self, agents: Sequence[Agent]) -> None:
        self._alike = tuple(agents)  # not registered: their parts are
        first = agents[0]
        if first.uses_torchdiffeq:
            raise UserError(
                "seeds > 1 needs a fixed-grid solver and another agent than FBRAC: train the seeds one by one"
            )
        parts = {name: nn.ModuleList(getattr(agent, name) for agent in agents) for name in first.parts}
        super().__init__(first.spec, parts, first._make_optimizer, first._seed, first.every)
        self.traits, self.headline, self.drifts = first.traits, first.headline, first.drifts
        if first._buffers:
            self.own_buffers = nn.ModuleList(_Buffers(agent) for agent in agents)
        self._stacked: dict[str, Tensor] = {}
        for agent in agents:
            agent.stacked = True
        self._of_first = (_Losses(first),)  # in a tuple, as it is no part either

    @property
    def agents(self) -> tuple[Agent, ...]:
        """The single agents, in the order of their seeds."""
        return self._alike

    def begin_stage(self, *settings: Any, **more: Any) -> None:
        super().begin_stage(*settings, **more)
        for agent in self._alike:
            agent.begin_stage(*settings, **more)

    def begin_update(self, step: int | None) -> None:
        super().begin_update(step)
        for agent in self._alike:
            agent.begin_update(step)

    def moves_targets(self, part: str) -> bool:
        return self._alike[0].moves_targets(part)

    def start_from(self, checkpoint: Any) -> None:
        for agent in self._alike:
            agent.start_from(checkpoint)
        self._moments = _stack_moments([agent._moments for agent in self._alike])

    def configure_optimizers(self) -> Any:
        self._stacked = _stack_parameters(self._alike)
        return super().configure_optimizers()

    def parameters_of(self, part: str) -> list[Tensor]:
        return [p for name, p in self._stacked.items() if p.requires_grad and name.startswith(f"{part}.")]

    def clip(self, gradients: Sequence[Tensor], limit: float) -> None:
        """Shorten each seed's gradient by itself, as its agent would."""
        squares = [gradient.square().reshape(len(gradient), -1).sum(1) for gradient in gradients]
        factors = (limit / (torch.stack(squares).sum(0).sqrt() + ALMOST_0)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    def seed_noise(self, *names: int | str) -> None:
        for agent in self._alike:
            agent.seed_noise(*names)

    @property
    def generators(self) -> list[torch.Generator]:
        return [generator for agent in self._alike for generator in agent.generators]

    def next_noise(self, batch: Batch) -> Any:
        return stack([agent.next_noise(_select(batch, i)) for i, agent in enumerate(self._alike)])

    def losses(self, batch: Batch, noise: Any) -> Iterator[Loss]:
        (of_first,) = self._of_first

        def of_one(parameters: dict[str, Tensor], batch: Batch, noise: Any) -> dict[str, tuple[Tensor, Metrics]]:
            parameters = {f"agent.{name}": parameter for name, parameter in parameters.items()}
            return functional_call(of_first, parameters, (batch, noise))

        of_seeds = vmap(of_one, in_dims=(0, _first_axis(batch), _first_axis(noise)))(self._stacked, batch, noise)
        for part, (losses, metrics) in of_seeds.items():
            yield part, losses.sum(), {name: value.mean(0) for name, value in metrics.items()}

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        first = self._alike[0]
        names = {id(parameter): name for name, parameter in first.named_parameters()}
        for online, target, tau in first.target_pairs():
            yield self._stacked[names[id(online)]], self._stacked[names[id(target)]], tau

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError("a stack has many policies: let one of its agents act")


class _Buffers(nn.Module):
    """The buffers of an agent that are in none of its parts: the same tensors, wherever they are moved or loaded."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self._buffers = agent._buffers
        self._non_persistent_buffers_set = agent._non_persistent_buffers_set


class _Losses(nn.Module):
    """An agent's losses as a module's forward pass, which is what `functional_call` calls."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, batch: Batch, noise: Any) -> dict[str, tuple[Tensor, Metrics]]:
        return {part: (loss, metrics) for part, loss, metrics in self.agent.losses(batch, noise)}


def _select(batch: Batch, index: int) -> Batch:
    return _like(batch, [None if column is None else column[index] for column in batch])


def _first_axis(columns: Columns) -> Columns:
    return _like(columns, [None if column is None else 0 for column in columns])


def _like(columns: Columns, values: Sequence[Any]) -> Columns:
    return cast(Any, type(columns))(*values)


def _stack_moments(of_agents: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """An optimizer's state of the stacked parameters, from that of each agent's; all have taken as many steps."""
    return {
        part: [
            None
            if None in of_one
            else {
                key: value if key == STEP else torch.stack([state[key] for state in of_one])
                for key, value in of_one[0].items()
            }
            for of_one in zip(*(moments[part] for moments in of_agents), strict=True)
        ]
        for part in of_agents[0]
    }


def _stack_parameters(agents: Sequence[Agent]) -> dict[str, Tensor]:
    """All parameters stacked over the agents, whose own become views."""
    stacked = {}
    of_each = [dict(agent.named_parameters()) for agent in agents]
    for name, parameter in of_each[0].items():
        stacked[name] = torch.stack([parameters[name].detach() for parameters in of_each])
        for parameters, view in zip(of_each, stacked[name], strict=True):
            parameters[name].data = view
        stacked[name].requires_grad_(parameter.requires_grad)
    return stacked
