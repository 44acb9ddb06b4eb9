"""BehaviorFlow: the data set's action distribution as a flow-matching model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from deflow.flow.ode import Gradient, Solver
from deflow.flow.path import straight_path
from deflow.nets.average import Average
from deflow.nets.encoder import make_encoder
from deflow.nets.frozen import frozen_call
from deflow.nets.vector_field import VectorField
from deflow.ranges import Activation, Rate, Widths
from deflow.types import Batch, Metrics, Spec


def bounded(plans: Tensor, action_dim: int) -> Tensor:
    """Plans whose first numbers, the actions, are clipped to [-1, 1]."""
    if plans.shape[-1] == action_dim:
        return plans.clamp(-1.0, 1.0)
    return torch.cat([plans[..., :action_dim].clamp(-1.0, 1.0), plans[..., action_dim:]], dim=-1)


class BehaviorFlow(LightningModule):
    r"""Flow matching on actions, conditioned on the observation; trained alone it is flow behaviour cloning.

    .. math:: L(\psi) = E_{(s, a), x_0, t} \| v_\psi(s, (1 - t) x_0 + t a, t) - (a - x_0) \|^2

    averaged over the batch and the action dimensions. Source: DeFlow (arXiv 2601.10471), FQL (arXiv 2502.02538).

    Args:
        spec: sizes of the task.
        hidden: widths of the hidden layers.
        activation: see `activate`.
        encoder: settings of the image encoder, see `Impala`; not read for states.
        solver: of the ODE.
        ema: if given, an average of the weights that keeps this share of itself at every update, in [0, 1), proposes in
            evaluation mode, in which a frozen flow is too.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Widths = (512, 512, 512, 512),
        activation: Activation = "gelu",
        encoder: Mapping[str, Any] | None = None,
        solver: Solver = Solver(),  # noqa: B008 (frozen)
        ema: Rate | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.action_dim = spec.action_dim  # fewer, if an agent generates more than actions
        self.field = VectorField(make_encoder(spec, activation, encoder), spec.action_dim, hidden, activation)
        self.average = Average(self.field, ema)
        self.solver = solver

    def loss(self, batch: Batch, x_0: Tensor, times: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The flow-matching loss.

        Args:
            batch: transitions; only observations and actions are read.
            x_0: standard normal noise, shape (batch, action_dim).
            times: in [0, 1], shape (batch, 1).
            weights: of the transitions, without gradient, shape (batch,); all 1 unless given.
        """
        x_t, velocity = straight_path(x_0, batch.actions, times)
        features = self.field.encode(batch.observations)
        errors = (self.field(features, x_t, times) - velocity).square().mean(-1)
        loss = errors.mean() if weights is None else (weights * errors).mean()
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def propose(self, observations: Tensor, z: Tensor) -> Tensor:
        r"""Proposals :math:`\mu_\psi(s, z)`: the ODE's solution from `z`, clipped to [-1, 1]; no gradient.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, action_dim), or several consecutive rows for each observation.
        """
        device, field = z.device.type, self.average.of(self.field)
        features = field.encode(observations)
        if not torch.is_autocast_enabled(device):
            return bounded(self.solver.sample(self._velocity(field, features), z), self.action_dim)
        # Autocast would convert the same weights at every step of the solver: here they are converted once.
        cast = field.cast(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return bounded(self.solver.sample(self._velocity(cast, features), z), self.action_dim)

    def follow(self, observations: Tensor, z: Tensor) -> Tensor:
        """Proposals as by `propose`, with a gradient into states and `z`, but none into the flow's own parameters."""
        field = self.average.of(self.field)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return frozen_call(field, observations, x, t.expand(len(x), 1))

        return bounded(self.solver.walk(velocity, z), self.action_dim)

    def target_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Pairs `(online, average, share)` for the agent's Polyak step."""
        yield from self.average.pairs(self.field)

    def sample(self, observations: Tensor, z: Tensor, gradient: Gradient = "backprop") -> Tensor:
        """Proposals as by `propose`, not clipped, with a gradient into the flow's parameters through the solution.

        Args:
            observations: shape (batch, observation_dim).
            z: standard normal noise, shape (batch, action_dim).
            gradient: how to obtain it, see `Solver.integrate`.
        """
        features = self.field.encode(observations)
        # An image's features are parameters of the ODE, and lead on to the encoder's.
        parameters = tuple(p for p in (*self.field.mlp.layers.parameters(), features) if p.requires_grad)
        return self.solver.integrate(self._velocity(self.field, features), z, gradient, parameters)

    @staticmethod
    def _velocity(
        field: Callable[[Tensor, Tensor, Tensor], Tensor], features: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, x: field(features, x, t.expand(len(x), 1))
