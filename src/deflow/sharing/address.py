"""Addresses of shared policies: `hf://USER/NAME` on Hugging Face's hub, `models:/NAME` in MLflow's model registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deflow.errors import UserError
from deflow.run_folder import REPORT_FILE

HUB, REGISTRY = "hf://", "models:/"
LATEST = "latest"
POLICY = "policy.safetensors"  # the one file of a shared policy that is read
CARD = "README.md"  # what people read
WHOLE = (CARD, POLICY, REPORT_FILE)  # all that a policy's place may hold of it


@dataclass(frozen=True)
class HubAddress:
    """A repository on the hub; `revision` is a branch, a tag or a commit, None for the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{HUB}{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class RegistryAddress:
    """A registered model; `version` is a number or `LATEST`, None where all of them are meant."""

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return f"{REGISTRY}{self.name}" + (f"/{self.version}" if self.version else "")


def is_address(path: str | Path) -> bool:
    """Whether `path` names a shared policy, and no file."""
    return isinstance(path, str) and path.startswith((HUB, REGISTRY))


def parse(text: str) -> HubAddress | RegistryAddress:
    """The address that `text` is.

    Raises:
        UserError: if it is none.
    """
    if found := re.fullmatch(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text, re.ASCII):
        return HubAddress(found[1], found[2])
    if found := re.fullmatch(rf"{REGISTRY}([\w .-]+)(?:/(\d+|{LATEST}))?", text, re.ASCII):
        return RegistryAddress(found[1], found[2])
    raise UserError(
        f"{text} is no address of a policy: {HUB}USER/NAME or {HUB}USER/NAME@REVISION on the hub, "
        f"{REGISTRY}NAME/VERSION or {REGISTRY}NAME/{LATEST} in MLflow's registry"
    )
