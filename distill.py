"""python distill.py ckpt=PATH [overrides]: train a one-step generator of a trained policy; resume=FOLDER goes on."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point, refuse_other_overrides
from deflow.imports import quick_imports


@entry_point("distill")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.distillation import distill

    if config.resume is not None:
        refuse_other_overrides("resume")
    distill(config, folder)


if __name__ == "__main__":
    main()
