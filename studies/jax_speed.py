"""Our updates beside DeFlow's joint update written in JAX, the authors' library: updates/s, in turns in one process.

python studies/jax_speed.py [key=value ...]    prints a table of docs/results/speed.md; needs `pip install jax optax`;
                                               the settings are those of `benchmark.py`: rounds=4, precisions=[fp32]...

The JAX update is ours too, written as their code is organised: one jitted function, a vmap over the critic's members,
the solver's steps unrolled, the tanh form of GELU, one Adam over everything. Before anything is timed, it must give
the losses that our update gives for the same weights, batch and noise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from hydra import compose, initialize_config_dir

from deflow.agents.base import Agent
from deflow.benchmark import make_agent, stage_loops, stages_of
from deflow.config import CONFIG_DIR
from deflow.timing import in_turns, ratio
from deflow.types import Batch, Spec

SOLVER_STEPS, LEARNING_RATE, TAU, DELTA = 10, 3e-4, 0.005, 0.01
SETTINGS = [
    f"agent.trust_region={DELTA}",
    "agent.critic.aggregate=mean",
    "precisions=[fp32,bf16]",
]
STAGES = ("joint", "behavior", "extraction_cached")
TOLERANCE = 1e-4

Tree = Any  # nested dictionaries and lists of arrays


def mlp(layers: Tree, x: jax.Array, norms: Tree = None) -> jax.Array:
    """Hidden layers with GELU and, if there are `norms`, layer normalisation; a linear last one."""
    for number, (weight, bias) in enumerate(layers[:-1]):
        x = jax.nn.gelu(x @ weight + bias, approximate=True)
        if norms:
            scale, shift = norms[number]
            mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + shift
    weight, bias = layers[-1]
    return x @ weight + bias


def values(critic: Tree, observations: jax.Array, actions: jax.Array) -> jax.Array:
    """Shape (members, batch)."""
    x = jnp.concatenate([observations, actions], -1)
    return jax.vmap(lambda member: mlp(member["layers"], x, member["norms"]))(critic).squeeze(-1)


def propose(flow: Tree, observations: jax.Array, z: jax.Array) -> jax.Array:
    for step in range(SOLVER_STEPS):
        times = jnp.full((len(z), 1), step / SOLVER_STEPS)
        z = z + mlp(flow, jnp.concatenate([observations, z, times], -1)) / SOLVER_STEPS
    return jnp.clip(z, -1, 1)


def refine(refiner: Tree, observations: jax.Array, base_actions: jax.Array) -> tuple[jax.Array, jax.Array]:
    residual = mlp(refiner, jnp.concatenate([observations, base_actions], -1))
    return jnp.clip(base_actions + residual, -1, 1), residual


def losses(parameters: Tree, target: Tree, batch: dict[str, jax.Array], noise: dict[str, jax.Array]) -> Tree:
    """Their sum, which is differentiated, and each by its part's name."""
    fixed = jax.lax.stop_gradient(parameters)
    observations, next_observations = batch["observations"], batch["next_observations"]

    x_t = (1 - noise["times"]) * noise["x_0"] + noise["times"] * batch["actions"]
    velocity = mlp(parameters["behavior_flow"], jnp.concatenate([observations, x_t, noise["times"]], -1))
    flow_loss = jnp.square(velocity - (batch["actions"] - noise["x_0"])).mean()

    next_base_actions = propose(fixed["behavior_flow"], next_observations, noise["z_next"])
    next_actions, _ = refine(fixed["refiner"], next_observations, next_base_actions)
    bootstrap = values(target, next_observations, next_actions).mean(0)
    target_values = batch["rewards"] + batch["discounts"] * bootstrap
    critic_loss = jnp.square(values(parameters["critic"], observations, batch["actions"]) - target_values).mean()

    base_actions = propose(fixed["behavior_flow"], observations, noise["z"])
    actions, residual = refine(parameters["refiner"], observations, base_actions)
    q = values(fixed["critic"], observations, actions).mean(0)
    size = jnp.square(residual).mean()
    improvement = -q.mean() / jax.lax.stop_gradient(jnp.abs(q).mean())
    penalty = jnp.exp(fixed["log_alpha"]) * size
    multiplier_loss = -parameters["log_alpha"] * (jax.lax.stop_gradient(size) - DELTA)

    parts = {"behavior_flow": flow_loss, "critic": critic_loss, "refiner": improvement + penalty + multiplier_loss}
    return sum(parts.values()), parts


def make_update(optimizer: optax.GradientTransformation) -> Callable[..., Tree]:
    @jax.jit
    def update(state: Tree, batch: dict[str, jax.Array], key: jax.Array) -> Tree:
        keys, shape = jax.random.split(key, 4), batch["actions"].shape
        noise = {name: jax.random.normal(k, shape) for name, k in zip(("x_0", "z", "z_next"), keys[:3], strict=True)}
        noise["times"] = jax.random.uniform(keys[3], (shape[0], 1))
        gradients, parts = jax.grad(losses, has_aux=True)(state["parameters"], state["target"], batch, noise)
        changes, moments = optimizer.update(gradients, state["moments"])
        parameters = optax.apply_updates(state["parameters"], changes)
        target = jax.tree.map(lambda p, t: TAU * p + (1 - TAU) * t, parameters["critic"], state["target"])
        return {"parameters": parameters, "target": target, "moments": moments}, parts

    return update


def arrays(batch: Batch) -> dict[str, jax.Array]:
    names = ("observations", "actions", "rewards", "discounts", "next_observations")
    return {name: jnp.asarray(getattr(batch, name).numpy()) for name in names}


def state_of(agent: Agent) -> Tree:
    """The agent's weights as JAX arrays."""
    weights = {name: jnp.asarray(value.detach().numpy()) for name, value in agent.state_dict().items()}
    depth = sum(name.startswith("refiner.net.layers") and name.endswith("weight") for name in weights)

    def plain(prefix: str) -> Tree:
        return [(weights[f"{prefix}.{i}.weight"].T, weights[f"{prefix}.{i}.bias"]) for i in range(depth)]

    def ensemble(prefix: str) -> Tree:
        def pairs(kind: str, count: int) -> Tree:
            names = [f"{prefix}.{kind}.{i}" for i in range(count)]
            return [(weights[f"{name}.weight"].squeeze(), weights[f"{name}.bias"].squeeze(1)) for name in names]

        tree = {"layers": pairs("layers", depth), "norms": pairs("norms", depth - 1)}
        tree["layers"][-1] = (weights[f"{prefix}.layers.{depth - 1}.weight"], tree["layers"][-1][1])
        return tree

    parameters = {
        "behavior_flow": plain("behavior_flow.field.mlp.layers"),
        "critic": ensemble("critic.online"),
        "refiner": plain("refiner.net.layers"),
        "log_alpha": jnp.asarray(1.0),
    }
    return {"parameters": parameters, "target": ensemble("critic.target")}


def check_equal(agent: Agent, batch: Batch) -> None:
    """Stop unless both give the same losses for the same weights, batch and noise."""
    noise = agent.noise(batch, "check")
    ours = {part: loss.item() for part, loss, _ in agent.losses(batch, noise)}
    drawn = {name: jnp.asarray(getattr(noise, name).numpy()) for name in ("x_0", "times", "z", "z_next")}
    state = state_of(agent)
    _, theirs = losses(state["parameters"], state["target"], arrays(batch), drawn)
    for part, loss in ours.items():
        if abs(loss - float(theirs[part])) > TOLERANCE * max(1, abs(loss)):
            sys.exit(f"error: the two updates differ: {part} {loss} against {float(theirs[part])} in JAX")


def jax_seconds(update: Callable[..., Tree], state: Tree, stream: Iterable[Batch]) -> float:
    """Seconds of one pass over `stream`."""
    started = time.perf_counter()
    for number, batch in enumerate(stream):
        state, _ = update(state, arrays(batch), jax.random.key(number))
    jax.block_until_ready(state)
    return time.perf_counter() - started


def main(overrides: Sequence[str]) -> None:
    settings = [*SETTINGS, *overrides]
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose("benchmark", settings)
        same_activation = compose("benchmark", [*settings, "networks.activation=gelu_tanh"])
    spec = Spec(config.observation_dim, config.action_dim)
    agent, compiled, twin = (make_agent(of, "deflow", spec) for of in (config, config, same_activation))
    compiled.compile_losses()
    stages = stages_of(config, agent)
    _, stream = stages["joint"]
    check_equal(twin, stream.batch(0))

    optimizer = optax.adam(LEARNING_RATE)
    state = state_of(twin)
    state["moments"] = optimizer.init(state["parameters"])
    loops: dict[Any, Callable[[], float]] = {"jax": partial(jax_seconds, make_update(optimizer), state, stream)}
    for kind, ours in (("", agent), (", compiled", compiled)):
        of_stages = stage_loops(config, ours, stages)
        loops |= {(stage + kind, name): of_stages[stage, name] for stage in STAGES for name in config.precisions}
    seconds = in_turns(loops, config.rounds)

    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| updates/s | " + " | ".join(config.precisions) + " |\n" + "|---" * (1 + len(config.precisions)) + "|")
    print(f"| JAX, joint | {config.updates / median(seconds['jax']):.1f} |" + " - |" * (len(config.precisions) - 1))
    for row in (stage + kind for stage in STAGES for kind in ("", ", compiled")):
        cells = []
        for name in config.precisions:
            speed, gain = config.updates / median(seconds[row, name]), ratio(seconds["jax"], seconds[row, name])
            cells.append(f"{speed:.1f} ({gain:.2f}x)")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
