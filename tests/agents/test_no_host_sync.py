"""No update waits for the device: nothing in it reads a tensor's value into Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deflow.build import build_agent
from deflow.types import Spec
from tests.agents.tester import EVERY_KIND, random_batch
from tests.conftest import compose_config

# What `.item()`, `bool()`, indexing by a mask and `torch.equal` come down to; on a GPU each waits for it.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount"}
WAITING |= {"repeat_interleave"}  # of counts that are a tensor
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}

SETTINGS = [
    *EVERY_KIND,
    "agent=deflow agent/critic=flow",
    "agent=fql agent/critic=floq",
    "agent=fql agent/dynamics=flow agent.dynamics.one_step=true",
    "agent=bc",
    "agent=iql agent.actor.extraction=ddpgbc",
]


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host must have before it can go on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = [of for of in args[1] if of is not None and of.dtype == torch.bool] if name in INDEXING else []
        assert name not in WAITING, f"{function} waits for the device"
        assert not masks, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", SETTINGS)
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


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[:1]),
        lambda x: torch.unique(x),
        lambda x: torch.repeat_interleave(x, torch.tensor([1, 2])),
        lambda x: bool(x.any()),
    ],
)
def test_the_check_notices(waits: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        waits(torch.ones(2))


class OnOneDevice(TorchDispatchMode):
    """Refuses operations on what is in main memory, which on a GPU would be copied there in every update."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            assert not (isinstance(leaf, torch.Tensor) and leaf.is_cpu), f"{function} takes a tensor of the CPU's"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", SETTINGS)
def test_nothing_is_made_elsewhere(overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On "meta" nothing is computed, but every tensor says where it would be; it has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    config = compose_config("experiment=cube_single", "networks.hidden=[8]", *overrides.split())
    agent = build_agent(config.agent, Spec(5, 3))
    agent.begin_stage("test", "all", first_step=0)
    on_cpu = random_batch(agent)
    noise = agent.draw_noise(on_cpu, torch.Generator().manual_seed(0))
    agent.to("meta").begin_update(0)
    batch, noise = (tree_map_only(torch.Tensor, lambda x: x.to("meta"), given) for given in (on_cpu, noise))
    with OnOneDevice():
        losses = [loss for _, loss, _ in agent.losses(batch, noise)]
        torch.stack(losses).sum().backward()
