"""DeFlow: decouple the flow that models behaviour from the light network that improves on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.actor_critic import ActorCritic, MakeCritic, MakeDynamics, take_best
from deflow.agents.algorithm import Loss
from deflow.agents.noise import FlowNoise
from deflow.agents.panels import Panel, loss_panel, value_panel
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.modules.constraints import ConstraintSettings
from deflow.modules.refiner import Refiner
from deflow.ranges import Count, Limit, Seed
from deflow.types import Batch, Spec


class DeFlow(ActorCritic):
    r"""DeFlow (arXiv 2601.10471).

    .. math::
        a_{base} &= sg[\mu_\psi(s, z)], \quad z \sim N(0, I) \\
        a_\pi &= clip(a_{base} + f_\phi(s, a_{base})) \\
        \min_\psi &\; E\|v_\psi(s, x_t, t) - (a - x_0)\|^2 \\
        \min_\theta &\; E(Q_\theta(s, a) - r - \gamma m \bar Q(s', a_\pi'))^2 \\
        \max_\phi &\; E\,Q(s, a_\pi) / sg[E|Q|] \quad \text{subject to} \quad E\|f_\phi\|^2 \le \delta

    Differences from the released code:
    1. A fixed alpha multiplies the penalty once (there twice).
    2. Best-of-N takes the candidate with the highest value (there the lowest).
    3. The three parts may train in stages; `stages=joint` is the papers' protocol.
    4. GELU is exact (there its tanh form, `networks.activation=gelu_tanh`, less than 1e-3 away).

    Args:
        spec: sizes of the task.
        behavior_flow: makes the BehaviorFlow from `spec`.
        critic: makes the Critic.
        refiner: makes the Refiner from `spec`, `trust_region` and `constraints`.
        optimizer: makes the optimizer from parameter groups.
        trust_region: delta, the limit of the mean squared residual in squared action units, > 0; or one limit an
            action dimension.
        constraints: further ones, each a mapping with the arguments of `Constraint`.
        seed: of every noise draw.
        best_of_n: policy actions scored by the mean value for each action taken; 1 is the papers' setting.
        refine_steps: how often the refiner is applied at test time. 1 is the papers' setting; with more, the
            candidate with the highest mean value is taken, the unrefined proposal included.
        dynamics: makes the model of the environment's steps, see `TransitionModel`; None: there is none.

    Raises:
        UserError: if `best_of_n` or `refine_steps` is below 1.
    """

    behavior_flow: BehaviorFlow
    refiner: Refiner
    climber = "refiner"
    headline = MappingProxyType(
        {"flow_loss": "behavior_flow/loss", "q": "refiner/q", "alpha": "refiner/trust_region/multiplier"}
    )

    def __init__(
        self,
        spec: Spec,
        behavior_flow: Callable[[Spec], BehaviorFlow],
        critic: MakeCritic,
        refiner: Callable[..., Refiner],
        optimizer: Callable[[Any], Optimizer],
        trust_region: Limit = 0.001,
        constraints: Sequence[ConstraintSettings] = (),
        seed: Seed = 0,
        best_of_n: Count = 1,
        refine_steps: Count = 1,
        dynamics: MakeDynamics | None = None,
    ) -> None:
        parts = {
            "behavior_flow": behavior_flow(spec),
            "critic": critic(spec),
            "refiner": refiner(spec, trust_region=trust_region, constraints=constraints),
        }
        super().__init__(spec, parts, optimizer, seed, dynamics=dynamics)
        self.best_of_n, self.refine_steps, self.trust_region = best_of_n, refine_steps, trust_region

    def losses(self, batch: Batch, noise: FlowNoise) -> Iterator[Loss]:
        yield from self.dynamics_loss(batch, noise)

        # Behaviour: flow matching on the data's actions.
        if self.trains("behavior_flow"):
            yield "behavior_flow", *self.behavior_flow.loss(batch, noise.x_0, noise.times)
        if not (self.trains("critic") or self.trains("refiner")):
            return

        base_actions, next_base_actions = self._proposals(batch, noise)

        # Critic: bootstraps from the refined policy at s'.
        with torch.no_grad():
            next_actions = self.refiner.refine(batch.next_observations, next_base_actions)
        if self.trains("critic"):
            target_batch, target_actions = self.expanded(batch, next_actions, noise, self._refined)
            yield "critic", *self.critic.loss(target_batch, target_actions, noise.levels)

        # Refiner: pathwise through Q into the residual, never into the flow or the critic.
        if self.trains("refiner"):
            yield (
                "refiner",
                *self.refiner.loss(
                    batch,
                    base_actions,
                    next_actions,
                    values=self.critic.frozen_values,
                    imagination=self.imagination(noise),
                    propose=self.behavior_flow.follow,
                ),
            )

    def _refined(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.refiner.refine(observations, self.behavior_flow.propose(observations, z))

    @property
    def policy_steps(self) -> int:
        return self.refiner.imagined_steps

    def _proposals(self, batch: Batch, noise: FlowNoise) -> tuple[Tensor, Tensor]:
        """Proposals at `s` and `s'`: the cached ones of a frozen flow, else both in one solve."""
        if batch.base_actions is not None and batch.next_base_actions is not None:
            return batch.base_actions, batch.next_base_actions
        states = torch.cat([batch.observations, batch.next_observations])
        base_actions, next_base_actions = self.behavior_flow.propose(states, torch.cat([noise.z, noise.z_next])).chunk(
            2
        )
        return base_actions, next_base_actions

    @property
    def act_noise_shape(self) -> tuple[int, ...]:
        return (self.best_of_n, self.spec.action_dim)

    def propose(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.behavior_flow.propose(observations, z[:, 0])

    def act(self, observations: Tensor, z: Tensor) -> Tensor:
        batch, candidates, action_dim = z.shape
        actions = self.behavior_flow.propose(observations, z.reshape(-1, action_dim))
        if self.refine_steps == 1 and candidates == 1:
            return self.refiner.refine(observations, actions)

        # Axis 1 of the choice: the candidates, or with several refinements every stage of each of them.
        chain = [actions]
        for _ in range(self.refine_steps):
            chain.append(self.refiner.refine(observations, chain[-1]))
        choice = torch.stack(chain[1:] if self.refine_steps == 1 else chain, dim=1)
        values = self.critic.values(observations, choice.reshape(-1, action_dim)).mean(0)
        return take_best(choice.reshape(batch, -1, action_dim), values.reshape(batch, -1))

    @property
    def cached_flow(self) -> BehaviorFlow:
        return self.behavior_flow

    def panels(self) -> list[Panel]:
        trust_region = "train/refiner/trust_region"
        limit = float(np.mean(self.trust_region))  # one, or one a dimension
        return [
            loss_panel("behavior_flow"),
            loss_panel("critic", log=True),
            value_panel("refiner"),
            Panel("multiplier", {f"{trust_region}/multiplier": "alpha"}),
            Panel("distance from the proposal", {f"{trust_region}/cost": "mean squared residual"}, True, limit),
            *self.dynamics_panels(),
        ]

    def facts(self) -> dict[str, Any]:
        return {"trust_region": self.trust_region}
