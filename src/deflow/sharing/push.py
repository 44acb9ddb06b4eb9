"""`push.py`: a policy shared, as weights and settings and a card for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from deflow.checkpoints import agent_of, load_checkpoint, newest_checkpoint, units_of
from deflow.data.sources.source import Source
from deflow.errors import UserError
from deflow.exporting import about_of, as_safetensors
from deflow.extras import require
from deflow.files import refuse_to_replace, replacing_all
from deflow.policy import Policy
from deflow.report import EVALUATED
from deflow.run_folder import COMMAND_MARK, CONFIG_FILE, FINAL, REPORT_FILE, SUMMARY_FILE, parsed_summary
from deflow.sharing import hub, registry
from deflow.sharing.address import CARD, POLICY, WHOLE, HubAddress, RegistryAddress, is_address, parse
from deflow.sharing.card import Shared, write_card
from deflow.sharing.private import without_places
from deflow.trust import trust_only


def push(config: DictConfig) -> str:
    """Share a policy; with `dry`, write what would be uploaded into a folder.

    Returns:
        The address from which it can be loaded again as it is now; or the folder.

    Raises:
        UserError: if the address is none, the checkpoint or the summary is damaged, a package is missing, nobody is
            logged in, or what is asked for cannot be reached. Nothing is made or uploaded then.
    """
    trust_only(config.trust)
    address = parse(config.to)
    if isinstance(address, RegistryAddress) and address.version is not None:
        raise UserError(f"to={address}: MLflow numbers the versions, say to={RegistryAddress(address.name)}")
    if is_address(config.ckpt):
        raise UserError(f"{config.ckpt} is shared already: ckpt= is a run's folder or a checkpoint in one")
    if config.dry:
        folder = Path(config.out).expanduser()
        if not config.overwrite:
            refuse_to_replace([folder / name for name in WHOLE])
    elif isinstance(address, HubAddress):
        require("hf://", hub.PACKAGE)
    shared, files = _collected(config)
    card = write_card(shared, address)
    files |= {CARD: card.encode()}

    if config.dry:
        with replacing_all([folder / name for name in files]) as parts:
            for part, content in zip(parts, files.values(), strict=True):
                part.write_bytes(content)
        for name in set(WHOLE) - set(files):  # of another policy, which lay there
            (folder / name).unlink(missing_ok=True)
        print(f"wrote {', '.join(sorted(files))} into {folder}; nothing was uploaded")
        return str(folder)
    if isinstance(address, HubAddress):
        hub.check_place(address)
        there = hub.upload(address, files, shared.title, config.private)
    else:
        there = registry.register(address, config.tracking_uri, files, card)
    print(f'shared ({sum(map(len, files.values())) / 1e6:.1f} MB): deflow.load("{there}")')
    return there


def _collected(config: DictConfig) -> tuple[Shared, dict[str, bytes]]:
    """What the card is about, and the files beside it."""
    file = newest_checkpoint(Path(config.ckpt).expanduser(), config.run_seed)
    checkpoint = load_checkpoint(file)
    policy = Policy(agent_of(checkpoint), units=units_of(checkpoint))
    trained = checkpoint["deflow"]["config"]
    source: Source = instantiate(trained["data"]["source"])
    about = about_of(policy, checkpoint["deflow"], source)

    run = (file.parent / "../..").resolve()
    is_run = (run / CONFIG_FILE).is_file()
    summary = _summary(run / SUMMARY_FILE) if is_run else None
    picture = run / REPORT_FILE
    files = {POLICY: as_safetensors(checkpoint, about)}
    if summary is not None and picture.is_file():
        files[REPORT_FILE] = picture.read_bytes()
    shared = Shared(
        about=about,
        trained=trained,
        summary=summary,
        is_result=_is_result(file, trained, summary or {}),
        command=without_places(_command(run / CONFIG_FILE)) if is_run else "",
        picture=REPORT_FILE if REPORT_FILE in files else None,
        trust=config.trust,
    )
    return shared, files


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    summary = parsed_summary(path.read_bytes())
    if summary is None:
        raise UserError(f"{path} is damaged: make it anew by resume={path.parent}, or move it away to share without it")
    return summary


def _is_result(file: Path, trained: dict[str, Any], summary: dict[str, Any]) -> bool:
    """Whether a checkpoint is what its run's last evaluation was of: that of the last stage's end, or a seed's."""
    *_, last = trained["stages"]
    in_last_stage = file.parent.name == f"{len(trained['stages']) - 1}_{last}"
    of_stages = [numbers.get("last_of_stage", (last,)) for key in EVALUATED if (numbers := summary.get(f"eval/{key}"))]
    was_evaluated = all(last in of_stage for of_stage in of_stages)
    return in_last_stage and was_evaluated and file.name in (FINAL, f"seed_{trained['seed']}.ckpt")


def _command(config: Path) -> str:
    """The command that began a run, which its configuration begins with; empty if it does not."""
    first = config.read_text().partition("\n")[0]
    return first.removeprefix(COMMAND_MARK) if first.startswith(COMMAND_MARK) else ""
