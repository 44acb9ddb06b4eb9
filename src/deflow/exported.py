"""ExportedPolicy: a policy out of an .onnx file, which onnxruntime computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deflow.errors import UserError
from deflow.extras import require
from deflow.policy import AnyPolicy
from deflow.types import Spec
from deflow.units import Units

SUFFIX = ".onnx"
FORMAT = 1  # of what such a file says of itself
ENTRY = "deflow"  # of the file's metadata: where it does
OBSERVATIONS, NOISE, ACTIONS = "observations", "noise", "actions"  # the graph's inputs and its output


@dataclass(frozen=True)
class About:
    """What an exported file says of itself.

    Args:
        agent: class of the agent.
        task: that it was trained for.
        protocol: of the task, see `Source.protocol`.
        settings: of how it acts, such as `best_of_n`.
        spec: sizes of observations and actions.
        units: of the environment; they are inside the graph, too.
        noise_shape: of one decision in one state.
        version: of deflow.
    """

    agent: str
    task: str
    protocol: Mapping[str, Any]
    settings: Mapping[str, Any]
    spec: Spec
    units: Units
    noise_shape: tuple[int, ...]
    version: str

    @property
    def plan_shape(self) -> tuple[int, int]:
        """Shape of what is decided in one state: actions of the chunk, numbers of an action."""
        return self.spec.horizon, self.spec.action_dim // self.spec.horizon

    def written(self) -> str:
        """All of it in JSON; whoever reads the file without deflow finds the shapes in it."""
        shapes = {OBSERVATIONS: self.spec.observation_shape, NOISE: self.noise_shape, ACTIONS: self.plan_shape}
        sizes = {"spec": self.spec, "units": self.units._asdict(), "shapes": shapes}
        return json.dumps({"format": FORMAT} | vars(self) | sizes)

    @classmethod
    def read(cls, text: str, path: Path) -> About:
        """What `written` gave; `UserError`, naming `path`, if it is something else."""
        try:
            content = json.loads(text)
            written = content["format"]
            if written == FORMAT:
                fields = {name: content[name] for name in cls.__dataclass_fields__}
                spec, noise_shape = Spec.of_list(fields["spec"]), tuple(map(int, fields["noise_shape"]))
                units = Units.of(fields["units"], spec)
                about = cls(**fields | {"spec": spec, "noise_shape": noise_shape, "units": units})
                assert min(about.plan_shape) > 0
                return about
        except (ValueError, KeyError, TypeError, ArithmeticError, AssertionError, RecursionError) as error:
            raise UserError(f"{path} is damaged: what it says of itself cannot be read") from error
        raise UserError(f"{path} was written by another version of deflow: update this one, or export it anew")


class ExportedPolicy(AnyPolicy):
    """Acts as the policy that was exported: with the same noise for a seed, and the same actions but for rounding.

    It computes on the CPU, with as many threads as torch has when the file is read. See `AnyPolicy`.

    Args:
        path: of the .onnx file.
        seed: of the noise that `act` draws.

    Raises:
        UserError: if there is no such file, it is damaged or was not exported by deflow, or onnxruntime is missing.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        self._session = _session(path)
        entries = self._session.get_modelmeta().custom_metadata_map
        if ENTRY not in entries:
            raise UserError(f"{path} was not exported by deflow: its metadata lack the entry '{ENTRY}'")
        self.about = About.read(entries[ENTRY], path)
        self._check_shapes(path)
        super().__init__(seed, self.about.units)

    @property
    def spec(self) -> Spec:
        return self.about.spec

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.about.noise_shape

    def plan(self, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
        (actions,) = self._session.run([ACTIONS], {OBSERVATIONS: self._as_taken(observations), NOISE: noise})
        return actions

    def _check_shapes(self, path: Path) -> None:
        """Raise `UserError` unless the graph has the shapes that the file says."""
        about, ends = self.about, (*self._session.get_inputs(), *self._session.get_outputs())
        found = {end.name: tuple(end.shape[1:]) for end in ends}
        said = {OBSERVATIONS: about.spec.observation_shape, NOISE: about.noise_shape, ACTIONS: about.plan_shape}
        if found != said:
            raise UserError(f"{path} is damaged: its graph has shapes {found}, and it says {said}")


def _session(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no file {path}")
    require(path.name, "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # an error is raised, and not printed as well
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen kinds for a file that is damaged or of something else
        raise UserError(f"cannot read {path}: it is no whole ONNX model that onnxruntime knows") from error
