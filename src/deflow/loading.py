"""`deflow.load`: a policy from a run's folder, a checkpoint, an exported file, or where it is shared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from deflow.checkpoints import agent_of, checkpoint_at, load_checkpoint, units_of
from deflow.errors import UserError
from deflow.exported import SUFFIX, ExportedPolicy
from deflow.policy import AnyPolicy, Policy
from deflow.trust import trust_only

ACTING = ("best_of_n", "refine_steps")  # settings of an agent that change how it acts and not what it has learned


def load(
    path: str | Path,
    seed: int = 0,
    explore: bool = False,
    device: str | torch.device = "cpu",
    trust: Sequence[str] = (),
    run_seed: int | None = None,
    tracking_uri: str | None = None,
    **settings: int | None,
) -> AnyPolicy:
    """A trained policy, ready to act: `deflow.load("logs/scene/2026-01-31_12-00-00").act(observation)`.

    Args:
        path: a run's folder, of which the newest stage is taken, finished or not; or a checkpoint;
            or a file that `export.py` wrote; or where `push.py` has shared one, as "hf://USER/NAME" (a revision of it,
            "hf://USER/NAME@REVISION") or "models:/NAME/VERSION" (the newest, "models:/NAME/latest").
        seed: of the policy's noise.
        explore: take the actions from which to learn in the environment instead of the best ones.
        device: on which the networks are; observations and actions stay on the CPU.
        trust: packages of your own whose code the checkpoint may name, from now on in this process.
        run_seed: which of a run's seeds, if it trained several.
        tracking_uri: of MLflow, for "models:/"; None: as MLFLOW_TRACKING_URI says, else "sqlite:///logs/mlflow.db".
        settings: `best_of_n` and `refine_steps`, if they shall be others than in training.

    Raises:
        UserError: if there is no checkpoint of ours at `path`, it is damaged or names what it may not, it holds several
            seeds, its agent does not have such a setting, or there is no such device; if an .onnx file is asked for
            what is fixed in it; or if what is shared cannot be had.
    """
    unknown = sorted(settings.keys() - set(ACTING))
    if unknown:
        raise UserError(f"load() does not know '{unknown[0]}': what can be changed is {' and '.join(ACTING)}")
    trust_only(trust)
    chosen = {name: value for name, value in settings.items() if value is not None}
    file = checkpoint_at(path, run_seed)
    if isinstance(file, Path) and file.suffix == SUFFIX:
        _refuse_what_is_fixed(file, chosen, explore, torch.device(device))
        return ExportedPolicy(file, seed)
    checkpoint = load_checkpoint(file, tracking_uri=tracking_uri)
    agent = agent_of(checkpoint, **chosen)
    try:
        agent.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        raise UserError(f"cannot use device={device}: {str(error).splitlines()[0]}") from error
    agent.freeze()
    return Policy(agent, explore, seed, units_of(checkpoint))


def _refuse_what_is_fixed(file: Path, chosen: dict[str, int], explore: bool, device: torch.device) -> None:
    """Raise `UserError` if an .onnx file is asked for more than it holds."""
    if chosen:
        name, value = next(iter(chosen.items()))
        raise UserError(f"{file} has its {name} inside: export the checkpoint anew with {name}={value}")
    if explore:
        raise UserError(f"{file} takes the best actions alone: load the checkpoint to explore")
    if device.type != "cpu":
        raise UserError(f"{file} is computed on the CPU: load the checkpoint with device={device}")
