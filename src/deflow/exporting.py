"""`export.py`: a trained policy as one file for the robot, and whether it acts as the checkpoint does."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from deflow.agents.base import Agent
from deflow.checkpoints import ENTRY_OF_WEIGHTS, WEIGHTS, agent_of, checkpoint_at, load_checkpoint, units_of
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.evaluating import play
from deflow.evaluation.latency import latency, random_observations
from deflow.evaluation.parity import Remembering, parity, random_states
from deflow.exported import ACTIONS, ENTRY, NOISE, OBSERVATIONS, SUFFIX, About
from deflow.extras import require
from deflow.files import check_folder, refuse_to_replace, replacing_all
from deflow.flow.ode import ADAPTIVE
from deflow.loading import ACTING, load
from deflow.modules.behavior_flow import BehaviorFlow
from deflow.policy import Policy
from deflow.sharing.address import is_address
from deflow.sharing.private import without_private
from deflow.trust import trust_only
from deflow.units import Units

OPSET, IR = 18, 8  # versions of ONNX's operators and of its file: both of 2023, so that a robot's runtime knows them
COMPARED = 1000  # observations
ROWS = (1, 64)  # decided at once, when the latency is measured
MAY_DIFFER = 0.01  # share of the observations in which rounding may choose another candidate
AT_RANDOM, IN_EPISODES = "random observations", "states of the episodes"  # which are compared


class Format(NamedTuple):
    """A kind of file that a policy is exported to."""

    suffix: str
    needs: tuple[str, ...]  # packages of the extra
    facts: dict[str, Any]  # what the report says of it
    content: Callable[[Policy, About, dict[str, Any]], bytes]  # of a policy, what it says of itself, its checkpoint


def export(config: DictConfig) -> dict[str, Any]:
    """Write the policy of a checkpoint as one file, and beside it as JSON how it compares with the checkpoint's.

    Returns:
        That comparison: `parity` for random observations, and of the `checkpoint` and the `exported` policy latencies.
        If there is an environment and episodes are asked for, also `parity_in_episodes`, for states that the
        checkpoint's met, and what both policies' episodes came to.

    Raises:
        UserError: if the checkpoint is broken or holds several seeds, the file exists, has another suffix or lies in a
            folder that is read-only, a package is missing, the policy cannot be exported, or what was exported acts
            otherwise. Nothing is written then.
    """
    trust_only(config.trust)
    path, format = config.ckpt, FORMATS[config.format]
    if config.out is None and is_address(path):
        raise UserError(f"out: name a file, there is nothing beside {path}")
    path = checkpoint_at(path, config.run_seed)
    out = Path(path).with_name(f"policy{format.suffix}") if config.out is None else Path(config.out).expanduser()
    files = out, _report_of(out)
    if out.suffix != format.suffix:
        raise UserError(f"out: format={config.format} makes a file that ends in {format.suffix}, got {out.name}")
    if not config.overwrite:
        refuse_to_replace(files)
    require(f"format={config.format}", *format.needs)

    checkpoint = load_checkpoint(path)
    check_folder(out.parent, "out")
    chosen = {key: config[key] for key in ACTING if config[key] is not None}
    agent = agent_of(checkpoint, **chosen)
    trained = checkpoint["deflow"]["config"]
    trained["agent"] |= chosen
    agent.freeze()
    policy = Policy(agent, units=units_of(checkpoint))
    source: Source = instantiate(trained["data"]["source"])
    about = about_of(policy, checkpoint["deflow"], source)
    content = format.content(policy, about, checkpoint)

    result = {"file": out.name, "format": config.format, **format.facts, "bytes": len(content), "of": str(path)}
    result |= {"task": about.task, **about.protocol, "agent": about.agent, **about.settings}
    with replacing_all(files) as (file, report):
        file.write_bytes(content)
        exported = load(file, trust=config.trust)
        print("comparing it with the checkpoint")
        result["parity"] = _checked(parity(policy, exported, random_states(policy, COMPARED)), AT_RANDOM)
        num_envs = trained["eval"]["num_envs"] if config.num_envs is None else config.num_envs
        for name, one in (("checkpoint", policy), ("exported", exported)):
            result[name] = {f"batch_{rows}": latency(one, rows) for rows in ROWS}
        if config.episodes and source.has_env:
            of_episodes = source, config.episodes, num_envs, config.seed
            remembering = Remembering(policy, COMPARED)
            result["checkpoint"] |= play(remembering, *of_episodes)
            result["parity_in_episodes"] = _checked(parity(policy, exported, remembering.met), IN_EPISODES)
            result["exported"] |= play(exported, *of_episodes)
        report.write_text(json.dumps(result, indent=2) + "\n")
    _print(result, out)
    return result


def _report_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def about_of(policy: Policy, trained: dict[str, Any], source: Source) -> About:
    """What an exported file says of itself.

    Args:
        policy: of a checkpoint.
        trained: the checkpoint's entry `deflow`.
        source: of the data that it was trained on.
    """
    settings = trained["config"]["agent"]
    return About(
        agent=type(policy.agent).__name__,
        task=trained["task"],
        protocol=trained["protocol"] if "protocol" in trained else source.protocol(),  # older ones do not say
        settings={key: settings[key] for key in ACTING if key in settings},
        spec=policy.spec,
        units=policy.units,
        noise_shape=policy.noise_shape,
        version=version("deflow"),
    )


def _checked(found: dict[str, float], which: str) -> dict[str, float]:
    if not math.isfinite(found["max_difference"]):
        raise UserError(f"actions are NaN or infinite for {which}: the weights are broken; nothing was written")
    if found["beyond_tolerance"] > MAY_DIFFER:
        raise UserError(
            f"the exported policy acts otherwise: {found['beyond_tolerance']:.1%} of {found['observations']} {which} "
            f"differ by more than {found['tolerance']:g}, at most by {found['max_difference']:.2g}; nothing was written"
        )
    return found


# As ONNX.


class DecisionGraph(nn.Module):
    """All of a decision, from the environment's observations to its actions: what the graph computes.

    Args:
        agent: in evaluation mode.
        units: of the environment.
    """

    def __init__(self, agent: Agent, units: Units) -> None:
        super().__init__()
        self.agent, self.units = agent, units

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Shape (batch, horizon, action_dim of the environment), float32; all that is random is in `noise`."""
        actions = self.agent.act(self.units.observed(observations), noise)
        return self.units.executed(actions.unflatten(1, (self.agent.spec.horizon, -1)))


def as_onnx(policy: Policy, about: About) -> bytes:
    """A graph whose loops over solver steps, candidates and refinements are unrolled; the batch may be of any size."""
    import onnx

    rng = np.random.default_rng(0)
    observations = torch.from_numpy(random_observations(policy.spec, 2, rng))
    noise = torch.from_numpy(np.stack([policy.draw_noise(rng) for _ in range(2)]))
    decision = DecisionGraph(policy.agent, policy.units).eval()
    rows = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            # Strict: by the Python code, where len(x) is the batch's size, whatever it will be.
            traced = torch.export.export(
                decision, (observations, noise), dynamic_shapes=({0: rows}, {0: rows}), strict=True
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=[OBSERVATIONS, NOISE],
                output_names=[ACTIONS],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # of every kind, from three compilers
        raise UserError(_why_not(policy.agent, error)) from error
    assert program is not None
    model = program.model_proto
    _tidy(model.graph)
    model.ir_version = IR
    onnx.helper.set_model_props(model, {ENTRY: about.written()})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _tidy(graph: Any) -> None:
    """Name the batch, and leave out where in the Python code each node came from, with this machine's paths."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for named in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        del named.metadata_props[:]
    del graph.value_info[:]


def _why_not(agent: Agent, error: Exception) -> str:
    flows = [module for module in agent.modules() if isinstance(module, BehaviorFlow)]
    if any(flow.solver.method in ADAPTIVE for flow in flows):
        return (
            "solver=dopri5 chooses its steps as it goes, so they cannot be unrolled: "
            "distill the policy first (distill.py), or use format=torch"
        )
    return f"{type(agent).__name__} cannot be written as ONNX: {str(error).strip().splitlines()[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compilers' remarks on themselves."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# As safetensors.


def as_safetensors(checkpoint: dict[str, Any], about: About) -> bytes:
    """Weights, and the settings as JSON: a checkpoint without what only training needs, see also `without_private`."""
    # Copies, each with memory of its own: some of a checkpoint's tensors may be views into the same.
    weights = {
        name: weight.clone(memory_format=torch.contiguous_format) for name, weight in checkpoint["state_dict"].items()
    }
    trained = checkpoint["deflow"]
    said = {"config": without_private(trained["config"]), "exported": json.loads(about.written())}
    return safetensors.torch.save(weights, {ENTRY_OF_WEIGHTS: json.dumps(trained | said)})


FORMATS = {
    "onnx": Format(
        SUFFIX, ("onnx", "onnxscript", "onnxruntime"), {"opset": OPSET}, lambda policy, about, _: as_onnx(policy, about)
    ),
    "torch": Format(WEIGHTS, (), {}, lambda _, about, checkpoint: as_safetensors(checkpoint, about)),
}


def _print(result: dict[str, Any], out: Path) -> None:
    table = Table(title="the exported policy beside the checkpoint's")
    for column in ("", "success", *(f"ms for {rows} at once, 99% (calls)" for rows in ROWS)):
        table.add_column(column)
    for name in ("checkpoint", "exported"):
        row = result[name]
        success = "{success:.2f} ({success_low:.2f} to {success_high:.2f})" if "success" in row else "-"
        in_words = "{latency_ms_p50:.2f}, {latency_ms_p99:.2f} ({latency_calls})"
        times = [in_words.format(**row[f"batch_{rows}"]) for rows in ROWS]
        table.add_row(name, success.format(**row), *times)
    Console().print(table)
    for name, which in (("parity", AT_RANDOM), ("parity_in_episodes", IN_EPISODES)):
        if name in result:
            found = result[name]
            print(
                f"{found['observations']} {which}: actions in [-1, 1] differ by at most {found['max_difference']:.2g}, "
                f"in the median by {found['median_difference']:.2g}"
            )
    print(f"wrote {out} ({result['bytes'] / 1e6:.1f} MB) and {_report_of(out).name}")
