"""Pinned numbers of the original implementations, by our parameters' names.

The fixtures hold weights, Adam's state, a batch and every noise draw of one update of the authors' released code
(32-wide networks, tanh GELU), taken after 20 warm-up updates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deflow.agents.base import Agent

# Our prefix -> the original's network.
NETWORKS = {
    "behavior_flow.field.mlp.": "actor_bc_flow/mlp",
    "refiner.net.": "refine_onestep_flow/mlp",
    "actor.net.": "actor_onestep_flow/mlp",
    "critic.online.": "critic/value_net",
    "critic.target.": "target_critic/value_net",
}
MULTIPLIER = "refiner.constraints.trust_region.log_multiplier"


class Reference:
    """One fixture."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).parent / f"{name}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def of(self, group: str, agent: Agent) -> dict[str, Tensor]:
        """The arrays of `group` (params, grads, ...) by our parameter names."""
        found = {}
        for name, parameter in agent.named_parameters():
            key = f"{group}/{_key(name)}"
            if key in self.arrays:
                value = self[key]
                if value.ndim == 2 and not name.startswith("critic"):
                    value = value.mT  # torch keeps kernels as (out, in)
                found[name] = value.reshape(parameter.shape).contiguous()
        return found


def _key(name: str) -> str:
    if name == MULTIPLIER:
        return "log_alpha/value"
    prefix, network = next((prefix, network) for prefix, network in NETWORKS.items() if name.startswith(prefix))
    kind, index, tensor = name.removeprefix(prefix).split(".")
    dense = kind == "layers"
    leaf = "bias" if tensor == "bias" else ("kernel" if dense else "scale")
    return f"{network}/{'Dense' if dense else 'LayerNorm'}_{index}/{leaf}"
