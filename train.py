"""python train.py experiment=NAME [overrides]: train, evaluate and report a policy."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point, refuse_other_overrides
from deflow.imports import quick_imports


@entry_point("train")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.pipeline import train

    if config.resume is not None:
        refuse_other_overrides("resume")
    train(config, folder)


if __name__ == "__main__":
    main()
