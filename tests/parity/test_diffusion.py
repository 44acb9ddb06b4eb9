"""One update of the diffusion and consistency baselines against their original code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from deflow.agents.cac import CAC, ConsistencyNoise
from deflow.agents.idql import IDQL, DiffusionNoise
from deflow.agents.optimizer import PartwiseAdam
from deflow.agents.srpo import SRPO, ScoreActor, ScoreNoise
from deflow.flow.schedules import growing_count, karras_times
from deflow.modules.consistency import ConsistencyPolicy
from deflow.modules.critic import Critic
from deflow.modules.diffusion import DenoisingDiffusion, ScoreModel
from deflow.modules.value import Value
from deflow.types import Spec
from tests.parity.original import Original

SPEC = Spec(7, 3)
LEAF = {"weight": "kernel", "bias": "bias"}


def idql_name(name: str) -> list[str]:
    """The original's key of one of our parameters."""
    part, network, *rest = name.split(".")
    if part == "behavior":
        return [f"{'score' if network == 'net' else 'target_score'}_model/{score_name(name)}"]
    *_, kind, index, tensor = rest if part == "critic" else [network, *rest]
    last = index == "3" and kind == "layers"
    if part == "value":
        layer = "LayerNorm_0" if kind == "norms" else f"Dense_{index}"
        leaf = "scale" if kind == "norms" and tensor == "weight" else LEAF[tensor]
        return [f"value/OutputVDense/{leaf}" if last else f"value/MLP_0/{layer}/{leaf}"]
    critic = "critic" if network == "online" else "target_critic"
    return [f"{critic}/VmapStateActionValue_0/{'' if last else 'MLP_0/'}Dense_{0 if last else index}/{LEAF[tensor]}"]


def score_name(name: str) -> str:
    name = name.removeprefix("behavior.net.").removeprefix("behavior.average.network.")
    if name == "time.frequencies":
        return "FourierFeatures_0/kernel"
    *_, kind, tensor = name.split(".")
    if name.startswith("condition"):
        return f"MLP_0/Dense_{kind}/{LEAF[tensor]}"
    if kind in ("first", "last"):
        return f"MLPResNet_0/Dense_{int(kind == 'last')}/{LEAF[tensor]}"
    _, kind, block, tensor = name.split(".")
    if kind == "norms":
        return f"MLPResNet_0/MLPResNetBlock_{block}/LayerNorm_0/{'scale' if tensor == 'weight' else 'bias'}"
    return f"MLPResNet_0/MLPResNetBlock_{block}/Dense_{int(kind == 'twos')}/{LEAF[tensor]}"


def test_idql() -> None:
    critic = partial(Critic, hidden=(32, 32, 32), activation="relu", norm="none")
    value = partial(Value, hidden=(32, 32, 32), activation="relu", norm="input", expectile=0.9)
    behavior = partial(DenoisingDiffusion, width=32, blocks=2, time_features=8, condition=16)
    optimizer = PartwiseAdam(fused=False, parts={"behavior": {"weight_decay": 1e-4}})
    agent = IDQL(SPEC, behavior, critic, value, optimizer, best_of_n=16, value_share=1.0)
    original = Original("idql", idql_name)
    original.load(agent)

    torch.testing.assert_close(agent.behavior.betas, original["expected/schedule/betas"])
    torch.testing.assert_close(agent.behavior.signals, original["expected/schedule/alpha_hats"])
    agent.eval()
    z = original["act/noise/z"][:, :5]  # the one at the last step is drawn there and not used
    torch.testing.assert_close(agent.act(original["act/observations"], z), original["act/actions"], rtol=0, atol=1e-5)

    keep = torch.cat([original[f"noise/dropout_keep_{block}"] for block in range(2)], dim=1)
    noise = DiffusionNoise(original["noise/time"].long()[:, None], original["noise/z"], keep)
    for part, key in (("behavior", "actor_loss"), ("value", "value_loss"), ("critic", "critic_loss")):
        # There each part has an update of its own, which sees what the one before it did.
        agent.begin_stage(part, [part], first_step=0, cosine_decay_steps=3_000_000, decaying=["behavior"])
        metrics = original.check_update(agent, noise, targets="after")
        original.check(key, metrics[part]["loss"])


def srpo_name(name: str) -> list[str]:
    """The original's key of one of our parameters."""
    part, network, *rest = name.split(".")
    if part == "behavior":
        return [f"behavior/{srpo_score_name('.'.join(rest))}"]
    *_, index, tensor = rest
    if part == "critic":
        prefix = "critic" if network == "online" else "target_critic"
        return [f"{prefix}/q{member}/{2 * int(index)}/{tensor}" for member in (1, 2)]
    theirs = {"value": "value/v", "actor": "policy/net"}[part]
    return [f"{theirs}/{2 * int(index)}/{tensor}"]


def srpo_score_name(name: str) -> str:
    if name == "time.frequencies":
        return "embed/0/W"
    *_, kind, tensor = name.split(".")
    if name.startswith("condition"):
        return f"cond_model/{2 * int(kind)}/{tensor}"
    if kind in ("first", "last"):
        return f"main/{'fc' if kind == 'first' else 'out_fc'}/{tensor}"
    _, kind, block, tensor = name.split(".")
    return f"main/blocks/{block}/{dict(norms='layer_norm', ones='fc1', twos='fc2')[kind]}/{tensor}"


def test_srpo() -> None:
    shape: dict[str, Any] = {"hidden": (32, 32), "activation": "relu", "norm": "none"}
    behavior = partial(ScoreModel, width=32, blocks=2, condition=16)
    actor = partial(ScoreActor, hidden=(32, 32, 32), beta=0.05, normalise=True, baseline=False)  # "VDS"
    value = partial(Value, **shape, expectile=0.9)
    optimizer = PartwiseAdam(fused=False, parts={"behavior": {"weight_decay": 0.01}})
    agent = SRPO(SPEC, behavior, partial(Critic, **shape), value, actor, optimizer)
    original = Original("srpo", srpo_name)
    for key, array in original.arrays.items():
        if key.endswith("cond_model/0/weight"):  # there the sines come before the cosines
            original.arrays[key] = array.roll(len(array) // 2, 0)
        if key.endswith(("q1/0/weight", "q2/0/weight")):  # and the action before the state
            original.arrays[key] = array.roll(-SPEC.action_dim, 0)
    original.load(agent)

    def uniform(part: str, low: float, high: float) -> Tensor:
        return low + (high - low) * original[f"noise/{part}/t_uniform"][:, None]

    keep = torch.cat([original[f"noise/behavior/dropout_{block}"] for block in range(2)], dim=1) > 0
    of_behavior = uniform("behavior", 1e-3, 1), original["noise/behavior/z"], keep
    noise = ScoreNoise(*of_behavior, uniform("policy", 0.02, 0.98), original["noise/policy/z"])
    for part in ("behavior", "critic", "value", "actor"):  # each from the same stored state
        original.load(agent)
        agent.begin_stage(part, [part], first_step=0, cosine_decay_steps=1_000_000, decaying=["actor"])
        metrics = original.check_update(agent, noise, targets="after")
        original.check(f"{'policy' if part == 'actor' else part}/loss", metrics[part]["loss"])


def cac_name(name: str) -> list[str]:
    """The original's key of one of our parameters."""
    part, network, *rest = name.split(".")
    *_, kind, index, tensor = rest
    if part == "critic":
        prefix = "critic" if network == "online" else "target_critic"
        return [f"{prefix}/q{member}_model/{2 * int(index)}/{tensor}" for member in (1, 2)]
    prefix = "actor" if network == "online" else "ema_actor"
    if kind == "time":
        return [f"{prefix}/model/time_mlp/{2 * int(index) + 1}/{tensor}"]
    layer = "final_layer" if index == "3" else f"mid_layer/{2 * int(index)}"
    return [f"{prefix}/model/{layer}/{tensor}"]


def test_cac() -> None:
    shape: dict[str, Any] = {"hidden": (32, 32, 32), "activation": "mish"}
    critic = partial(Critic, **shape, norm="none", reduction="sum")
    optimizer = PartwiseAdam(fused=False, clip=2.0)
    agent = CAC(SPEC, critic, partial(ConsistencyPolicy, **shape), optimizer, eta=1.0, backup_samples=1)
    original = Original("cac", cac_name)
    original.load(agent)

    torch.testing.assert_close(agent.actor.step_levels.flip(0), original["expected/sampler_times"])
    count = growing_count(20, 21, 2, 150)
    index = original["noise/t_index"]
    boundaries = karras_times(torch.arange(count), count, 0.002, 80.0, 7.0)
    torch.testing.assert_close(boundaries, original["expected/boundaries"])
    noise = ConsistencyNoise(
        torch.stack([original[f"noise/z_{step}"] for step in range(2)]),
        torch.stack([original[f"noise/z_next_{step}"] for step in range(2)]),
        original["noise/z_consistency"],
        boundaries[torch.cat([index, index + 1], dim=1)],
        (original["noise/choose_q"] > 0.5).float(),
    )
    for part in ("critic", "actor"):  # there the actor sees the critic of after its step
        agent.begin_stage(part, [part], first_step=1000)
        agent.begin_update(0)
        metrics = original.check_update(agent, noise, targets="after")
        original.check(f"{part}_loss", metrics[part]["loss"])
    original.check("bc_loss", metrics["actor"]["consistency"])
    original.check("ql_loss", metrics["actor"]["value_loss"])
