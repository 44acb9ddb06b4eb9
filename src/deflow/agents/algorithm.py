"""Algorithm: what an agent's author writes; `Agent` in base.py does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.transition_flow import TransitionModel
from deflow.types import Batch, Foresight, Metrics, Spec

Loss = tuple[str, Tensor, Metrics]


class Traits(NamedTuple):
    """What the rest of the package must know of an algorithm before it trains."""

    reads_returns: bool = False  # whether the losses read `Batch.returns`
    reads_path: bool = False  # whether the losses read `Batch.path`
    trains_jointly: bool = False  # whether all parts but a model only make sense when they train in the same stage
    takes_lowest: bool = False  # whether an ensemble's lowest value is taken, whatever the critic says
    learns_by_playing: bool = False  # whether it makes little of data alone
    differentiates_flow: bool = False  # whether the losses have a gradient through the flow's solution
    imitates: bool = False  # whether it learns from actions alone, whatever they earned
    never_acts: tuple[str, ...] = ()  # parts of which an action takes nothing
    own_stages: str | None = None  # the choice of `stages=` that is made for it


class Algorithm(ABC):
    """Losses and actions, which every algorithm writes, and what it may say of itself, with what holds for most."""

    spec: Spec  # sizes of the task

    traits = Traits()
    # Whether the optimizer's momentum moves a part that is not due in an update, as if its gradient were 0.
    drifts = False
    valuing_part: str | None = None  # the one that `action_values` come from
    # What the progress bar shows: name -> metric of a part, as "actor/q"; the losses unless an algorithm knows better.
    headline: Mapping[str, str] = MappingProxyType({})
    # Steps that may be taken in its model of the environment, as a stage found; None: as many as are asked for.
    allowed_steps: int | None = None

    def draw_noise(self, batch: Batch, generator: torch.Generator) -> Any:
        """Every random number that one evaluation of the losses uses: those of a flow agent, unless it needs others.

        A named tuple of tensors, which several seeds' are stacked in; `()` for an agent that needs none. What dropout
        leaves in is called `keep`, and is None in validation.
        """
        return FlowNoise.draw(batch, generator)

    @abstractmethod
    def losses(self, batch: Batch, noise: Any) -> Iterable[Loss]:
        """`(part, loss, metrics)` of every part that trains in this update (see `trains`); metrics hold the loss."""

    @abstractmethod
    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        """The best actions that the agent knows, in [-1, 1], shape (batch, action_dim); called by `Policy`.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, *act_noise_shape).
        """

    def explore(self, observations: Tensor, z: Tensor) -> Tensor:
        """The actions from which to learn in the environment: those of `act`, unless it needs others."""
        return self.act(observations, z)

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that one decision in one state takes: one vector, unless it needs more."""
        return (self.spec.action_dim,)

    def propose(self, observations: Tensor, z: Tensor) -> Tensor | None:
        """What `act` improves on, from the same arguments and of the same shape; None if there is no such thing."""
        return None

    def foresee(self, observations: Tensor, z: Tensor) -> Foresight | None:
        """The states that `act` expects, given the same arguments; None for an agent that expects none."""
        return None

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor | None:
        """How good actions are, shape (batch,), higher is better; None for an agent without values."""
        return None

    def panels(self) -> Sequence[Panel]:
        """What `report.png` shows of the training beside success: the losses, unless an algorithm knows better."""
        return [loss_panel(part) for part in self.parts]

    def moves_targets(self, part: str) -> bool:
        """Whether the targets of `part` move in this update: when it trains, unless an algorithm knows better."""
        return self.trains(part)

    @property
    def cached_flow(self) -> BehaviorFlow | None:
        """The flow whose proposals may come with the batch once it is frozen, without the noise they started from."""
        return None

    @property
    def transition_model(self) -> TransitionModel | None:
        """What it knows of the environment's steps, if it has a model of them."""
        return None

    @property
    def asked_steps(self) -> tuple[int, int]:
        """Steps in its model that the critic's target and the policy's objective ask for."""
        return 0, 0

    @property
    def steps_of_stage(self) -> tuple[int, int]:
        """The steps that parts ask for which train in this stage, as in `asked_steps`."""
        return 0, 0

    @property
    def limits_steps(self) -> bool:
        """Whether the model's errors limit the steps that this stage takes in it."""
        model = self.transition_model
        return model is not None and model.within is not None and any(self.steps_of_stage)

    def facts(self) -> dict[str, Any]:
        """What a run's summary says of the agent beside its results, in plain values."""
        return {}

    # What `Agent` knows.

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of all parts that can train."""

    @abstractmethod
    def trains(self, part: str) -> bool:
        """Whether `part` trains in the update at hand; outside of updates, in the current stage."""
