"""Updates as one launch. No GPU is needed: `Recording` plays what a CUDA graph does, operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deflow import training
from deflow.agents import graphed_update
from deflow.agents.algorithm import Loss
from deflow.agents.base import Agent
from deflow.agents.graphed_update import GraphedUpdate, keep_rates_on
from deflow.agents.seed_stack import SeedStack
from deflow.build import build_agent
from deflow.checkpoints import load_checkpoint
from deflow.errors import NonFiniteLossError
from deflow.loggers import read_metrics
from deflow.one_launch import WARM_UPS, OneLaunch
from deflow.pipeline import train as run_training
from deflow.types import Batch, Spec, stack
from tests.agents.tester import EVERY_KIND, random_batch
from tests.conftest import CKPT, compose_config, tiny_config

UPDATES = 2 * WARM_UPS + 7  # enough that updates of two kinds are recorded
FAR = 431  # steps from one update to the next: what a step changes has changed, whatever it is
SPEC = Spec(5, 3)


class Recording(TorchDispatchMode):
    """Remembers operations with the very tensors they were given, and does them again into the same memory.

    So nothing that Python computes after the recording has an effect, and nothing that it kept comes to life: what a
    replay shows is what a CUDA graph would show.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Callable[[], None]] = []
        self._is_done = True  # by the recording, which does what it records, as a GPU's does not

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function.overloadpacket.__name__ != "_local_scalar_dense", "Python reads a value of the device's"
        results = function(*args, **kwargs)
        if any(argument.alias_info is not None for argument in function._schema.returns) and not _writes(function):
            return results  # a view: it looks at memory that is written to anyway

        def again() -> None:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.detach().copy_(new)

        self._operations.append(again)
        return results

    def replay(self) -> None:
        if not self._is_done:
            with torch.no_grad():
                for operation in self._operations:
                    operation()
        self._is_done = False


def _writes(function: Any) -> bool:
    return any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in function._schema.arguments
    )


@pytest.fixture(autouse=True)
def recordings_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: OneLaunch, inputs: Any) -> None:
        self._inputs = tree_map_only(torch.Tensor, torch.clone, inputs)
        with Recording() as self._graph:
            self._results = self._function(*self._inputs)

    def one_by_one(losses: Iterator[Loss]) -> list[Loss]:
        found = list(losses)
        for _, loss, _ in found:
            loss.backward()
        return found

    monkeypatch.setattr(graphed_update, "_side_by_side", one_by_one)
    monkeypatch.setattr(OneLaunch, "_beside", lambda self, inputs: self._function(*inputs))
    monkeypatch.setattr(OneLaunch, "_record", record)


def make(overrides: str, seed: int = 0) -> Agent:
    torch.manual_seed(seed)
    config = compose_config("experiment=cube_single", "networks.hidden=[8]", f"seed={seed}", *overrides.split())
    return build_agent(config.agent, SPEC)


def train(agent: Agent, recorded: bool, batches: Sequence[Batch], **stage: Any) -> list[list[torch.Tensor]]:
    """The losses of each update."""
    agent.begin_stage("test", "all", first_step=0, **stage)
    configured = agent.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    keep_rates_on(agent.device, optimizer)
    update = GraphedUpdate(agent, optimizer) if recorded else lambda batch: agent.update(optimizer, batch)
    seen = []
    for number, batch in enumerate(batches):
        agent.begin_update(FAR * number)
        agent.seed_noise("noise", number)
        seen.append([loss.clone() for _, loss, _ in update(batch)])
        if isinstance(configured, dict):
            configured["lr_scheduler"]["scheduler"].step()
    return seen


@pytest.mark.parametrize(
    "overrides",
    [
        *EVERY_KIND,
        "agent=deflow agent.behavior_flow.ema=0.5",
        "agent=deflow agent/critic=flow agent.critic.value_range=[-1,0]",
        "agent=fql agent/critic=floq agent.critic.value_range=[-1,0]",
        "agent=rebrac agent.drift=false +agent.optimizer.parts.actor.clip=0.01",
        "agent=bc agent.actor.dropout=0.1",
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_recorded_updates_make_the_same_bits(overrides: str, seeds: int) -> None:
    agents: list[Agent] = []
    for _ in range(2):
        alike = [make(overrides, seed) for seed in range(seeds)]
        agents.append(alike[0] if seeds == 1 else SeedStack(alike))
    of_seeds = [[random_batch(make(overrides), seed=10 * n + s) for n in range(UPDATES)] for s in range(seeds)]
    batches = of_seeds[0] if seeds == 1 else [stack(several) for several in zip(*of_seeds, strict=True)]
    losses = [
        train(agent, recorded, batches, cosine_decay_steps=20_000)
        for agent, recorded in zip(agents, (False, True), strict=True)
    ]
    assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(*losses, strict=True))
    mine, recorded = (agent.state_dict() for agent in agents)
    for name, weight in mine.items():
        assert torch.equal(weight, recorded[name]), name


def test_the_watch_sees_what_is_recorded() -> None:
    agent = make("agent=flow_bc")
    batches = [random_batch(agent, seed=n) for n in range(UPDATES)]
    bad = UPDATES - 1  # counted from 1
    batches[bad - 1] = batches[bad - 1]._replace(actions=batches[0].actions * torch.nan)
    train(agent, True, batches)
    with pytest.raises(NonFiniteLossError, match=f"at update {100 + bad} of stage 'test'"):
        agent._watch.check("test", 100 + UPDATES)


@pytest.mark.usefixtures("short_episodes")
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_run_in_blocks_is_the_run(
    seeds: int, point_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rhythms = "trainer.log_every_n_steps=4 validate_every=12 eval.every=20 checkpoint_every=8 updates=30"
    config = tiny_config(
        point_data, "experiment=pointmaze", f"seeds={seeds}", "+stages.joint.cosine_decay=true", *rhythms.split()
    )

    def keeps_rates(agent: Agent) -> None:  # so that both compute with the same
        keep_rates_on(agent.device, agent.trainer.optimizers[0])

    monkeypatch.setattr(Agent, "on_train_start", keeps_rates)
    for kind, records in (("plain", False), ("blocks", True)):
        monkeypatch.setattr(training, "_records", lambda run, trainer, records=records: records)
        run_training(copy.deepcopy(config), tmp_path / kind)
    plain, blocks = (load_checkpoint(tmp_path / kind / CKPT) for kind in ("plain", "blocks"))
    for name, weight in plain["state_dict"].items():
        assert torch.equal(weight, blocks["state_dict"][name]), name
    assert blocks["global_step"] == 30
    rows = [read_metrics(tmp_path / kind / "metrics.csv") for kind in ("plain", "blocks")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "overrides,says",
    [
        ("", None),
        ("trainer.gradient_clip_val=1", "agent.optimizer.clip"),
        ("agent=fbrac", "torchdiffeq"),
        ("solver=dopri5", "torchdiffeq"),
        ("trainer.one_launch=false", ""),
    ],
)
def test_what_is_not_recorded_is_said(overrides: str, says: str | None, caplog: pytest.LogCaptureFixture) -> None:
    config = compose_config("experiment=cube_single", "trainer=gpu", *overrides.split())
    run = SimpleNamespace(config=config, learner=build_agent(config.agent, SPEC))
    strategy, clip = SingleDeviceStrategy(torch.device("cuda")), config.trainer.gradient_clip_val
    trainer = SimpleNamespace(strategy=strategy, gradient_clip_val=clip)
    with caplog.at_level("INFO"):
        assert training._records(run, trainer) == (says is None)
    assert (says or "") in caplog.text
    trainer.strategy = SimpleNamespace(root_device=torch.device("cuda"))  # DDP, if only of one process
    assert not training._records(run, trainer)
    trainer.strategy, run.learner._make_optimizer = strategy, partial(torch.optim.SGD, lr=0.1)
    assert not training._records(run, trainer)
