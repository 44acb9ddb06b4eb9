"""No update waits for the device: nothing in it reads a tensor's value into Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deflow.build import build_agent
from deflow.types import Spec
from tests.agents.tester import random_batch
from tests.conftest import compose_config

# What `.item()`, `bool()`, indexing by a mask and `torch.equal` come down to; on a GPU each waits for it.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2"}


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host must have before it can go on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        "agent=deflow",
        "agent=deflow solver=rk4 agent.refiner.objective=gradient_step",
        "agent=deflow agent/critic=flow",
        "agent=fql",
        "agent=fql agent/critic=floq",
        "agent=fql agent/critic=occupancy",
        "agent=deflow agent/dynamics=gaussian agent.dynamics.expansion=1 agent.refiner.objective=unrolled",
        "agent=fql agent/dynamics=flow agent.dynamics.one_step=true",
        "agent=ifql",
        "agent=fawac",
        "agent=flow_bc",
        "agent=cal_ql agent.target_gap=0.8",
        "agent=rlpd agent.critic.rho=0.5",
        "agent=rebrac",
        "agent=bc",
        "agent=iql",
        "agent=iql agent.actor.extraction=ddpgbc",
        "agent=idql agent.behavior.width=8",
        "agent=srpo agent.behavior.width=8",
        "agent=cac",
    ],
)
def test_an_update_never_waits(overrides: str) -> None:
    config = compose_config("experiment=cube_single", "networks.hidden=[8]", *overrides.split())
    agent = build_agent(config.agent, Spec(5, 3))
    agent.begin_stage("test", "all", first_step=0)
    optimizer = agent.configure_optimizers()
    batch = random_batch(agent)
    for number in range(2):  # the first step makes the optimizer's state
        with NoWaiting():
            agent.begin_update(number)
            noise = agent.draw_noise(batch, torch.Generator().manual_seed(0))
            losses = list(agent.losses(batch, noise))
            agent._watch.see(losses)
            optimizer.zero_grad()
            torch.stack([loss for _, loss, _ in losses]).sum().backward()
            agent.on_before_optimizer_step(optimizer)
            optimizer.step()


def test_the_check_notices() -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        torch.ones(1).item()
