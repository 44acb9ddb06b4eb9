"""One update of an original implementation, pinned: weights, Adam's state, batch and noise, and what came of them.

Every file was taken after 20 warm-up updates of 32-wide networks on random data. A test says where the original has
what is ours: `theirs(name)` gives, for one of our parameters, the keys of the original's, several where it keeps apart
what we keep side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from deflow.agents.base import Agent
from deflow.types import Batch, Metrics

RTOL = 1e-4  # of losses and, by their norms, gradients
ATOL = 1e-5  # of weights after the update, or a twentieth of what the update moved them by, if that is less

Theirs = Callable[[str], Sequence[str]]


class Original:
    """One file.

    Args:
        name: of the file.
        theirs: keys of the original's tensors that make up one of our parameters, without the group; none where the
            original has none.
    """

    def __init__(self, name: str, theirs: Theirs) -> None:
        with np.load(Path(__file__).parent / f"{name}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "config_json"}
        self._theirs = theirs

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def batch(self, prefix: str = "", discount: float = 0.99) -> Batch:
        """The transitions; next actions that the file lacks are NaN."""
        columns = {key: self[f"{prefix}batch/{key}"] for key in ("observations", "actions", "next_observations")}
        rewards, discounts = self[f"{prefix}batch/rewards"], discount * self[f"{prefix}batch/masks"]
        missing = torch.full_like(columns["actions"], torch.nan)
        next_actions = self.arrays.get(f"{prefix}batch/next_actions", missing)
        return Batch(**columns, rewards=rewards, discounts=discounts, next_actions=next_actions)

    def of(self, group: str, agent: Agent) -> dict[str, Tensor]:
        """The arrays of a group (`params`, `grads`, ...) by our parameters' names and in their shapes."""
        found = {}
        for name, parameter in agent.named_parameters():
            keys = [f"{group}/{key}" for key in self._theirs(name)]
            if keys and all(key in self.arrays for key in keys):
                found[name] = _as_ours([self[key] for key in keys], parameter)
        return found

    def load(self, agent: Agent) -> None:
        """Give the agent the weights from before the update; it must have no others."""
        weights = self.of("params", agent)
        missing = {name for name, _ in agent.named_parameters()} - set(weights)
        assert not missing, f"the original has no {sorted(missing)}"
        with torch.no_grad():
            for name, parameter in agent.named_parameters():
                parameter.copy_(weights[name])

    def optimizer(self, agent: Agent) -> Optimizer:
        """The agent's optimizer with the moments, and the learning rate of its schedule, from before the update."""
        optimizer = agent.configure_optimizers()
        if isinstance(optimizer, dict):
            schedule, optimizer = optimizer["lr_scheduler"]["scheduler"], optimizer["optimizer"]
            for _ in range(int(self["adam/count"])):
                optimizer.step()
                schedule.step()
        mu, nu = self.of("adam/mu", agent), self.of("adam/nu", agent)
        for name, parameter in agent.named_parameters():
            if parameter.requires_grad:
                step = self["adam/count"].float()
                optimizer.state[parameter] = {"step": step, "exp_avg": mu[name], "exp_avg_sq": nu[name]}
        return optimizer

    def check_update(
        self,
        agent: Agent,
        noise: Any,
        optimizer: Optimizer | None = None,
        targets: Literal["before", "after"] = "before",
        prefix: str = "",
        before: str = "params",
    ) -> dict[str, Metrics]:
        """Make one update; compare its gradients and the weights after it, those of the parts in the stage.

        Args:
            agent: that learns, with the original's weights.
            noise: what the agent draws.
            optimizer: of the agent, if it is not a fresh one from `optimizer`.
            targets: whether they move toward the weights of before the step, as they do in our training, or after it.
            prefix: of the update's arrays.
            before: group of the weights from before the update.

        Returns:
            The metrics of each part.
        """
        optimizer = optimizer or self.optimizer(agent)
        losses = list(agent.losses(self.batch(prefix), noise))
        agent.zero_grad()  # of what another stage trained as well
        torch.stack([loss for _, loss, _ in losses]).sum().backward()
        self._check_gradients(agent, prefix)
        pairs = list(agent.target_pairs())
        were = [target.clone() for _, target, _ in pairs]
        agent.on_before_optimizer_step(optimizer)
        optimizer.step()
        if targets == "after":
            with torch.no_grad():
                for (online, target, tau), was in zip(pairs, were, strict=True):
                    target.copy_(was.lerp(online, tau))
        self._check_weights(agent, prefix, before)
        return {part: metrics for part, _, metrics in losses}

    def _check_gradients(self, agent: Agent, prefix: str) -> None:
        expected = self.of(f"{prefix}grads", agent)
        for name, parameter in agent.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, name
            elif agent.trains(_part(name)):
                assert parameter.grad is not None, f"{name} has no gradient"
                error = (parameter.grad - expected[name]).norm() / expected[name].norm()
                assert error < RTOL, f"{name}: relative gradient error {error:.1e}"

    def _check_weights(self, agent: Agent, prefix: str, before: str) -> None:
        was, expected = self.of(before, agent), self.of(f"{prefix}params_after", agent)
        for name, parameter in agent.named_parameters():
            if _part(name) in agent._active:
                after = expected.get(name, was[name])  # what is fixed there has no weights after the update
                allowed = min(ATOL, float((after - was[name]).abs().max()) / 20)
                error = (parameter.detach() - after).abs().max()
                assert error <= allowed, f"{name}: off by {error:.1e}, where {allowed:.1e} are allowed"

    def check(self, key: str, value: Tensor, prefix: str = "") -> None:
        """A loss or a diagnostic."""
        torch.testing.assert_close(
            value, self[f"{prefix}expected/{key}"], rtol=RTOL, atol=1e-6, msg=lambda m: f"{key}: {m}"
        )


def fql_name(name: str, parts: dict[str, str]) -> list[str]:
    """The key of one of our parameters in FQL's, Value Flows' or QAM's code.

    Args:
        name: of ours.
        parts: our prefix of a network, such as `critic.online.`, to theirs, such as `critic/value_net`.
    """
    prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
    if prefix is None:
        return []
    kind, index, tensor = name.removeprefix(prefix).split(".")
    layer = "Dense" if kind == "layers" else "LayerNorm"
    leaf = "bias" if tensor == "bias" else ("kernel" if kind == "layers" else "scale")
    return [f"{parts[prefix]}/{layer}_{index}/{leaf}"]


def _part(name: str) -> str:
    """The part that a parameter belongs to."""
    return name.partition(".")[0]


def _as_ours(theirs: Sequence[Tensor], parameter: Tensor) -> Tensor:
    """Their kernels are (in, out). What they keep apart are members of an ensemble, or outputs side by side."""
    join = partial(torch.stack, dim=0) if parameter.ndim == 3 else partial(torch.cat, dim=-1)
    value = join(tuple(theirs)) if len(theirs) > 1 else theirs[0]
    if value.ndim == 2 and parameter.ndim == 2:
        value = value.mT
    return value.reshape(parameter.shape).clone()
