"""When targets move in an update as Lightning makes it."""

from __future__ import annotations

from itertools import repeat

import torch
from lightning import Trainer

from deflow.build import build_agent
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.conftest import compose_config


def test_targets_move_toward_the_weights_that_made_the_updates_losses() -> None:
    torch.manual_seed(0)
    agent = build_agent(compose_config("agent=fql", "networks.hidden=[16,16]", "tau=0.25").agent, Spec(5, 3))
    with torch.no_grad():
        for target in agent.critic.target.parameters():
            target.add_(1.0)
    before = {name: value.clone() for name, value in agent.critic.state_dict().items()}
    switched_off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    # No validation, but a loader for it, without which Lightning warns.
    settings = {"max_steps": 1, "log_every_n_steps": 1, "limit_val_batches": 0} | dict.fromkeys(switched_off, False)
    trainer = Trainer(accelerator="cpu", **settings)
    trainer.fit(agent, repeat(random_batch(agent)), val_dataloaders=repeat(None))
    for name, value in agent.critic.state_dict().items():
        old = before[name.replace("target", "online")]
        if name.startswith("target"):
            torch.testing.assert_close(value, torch.lerp(before[name], old, 0.25), rtol=0, atol=1e-6)
        else:
            assert (value - old).abs().max() > 1e-4  # the step: its rate is 3e-4
