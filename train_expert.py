"""python train_expert.py [overrides]: train a walking ant like the one that makes the antmaze data."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point
from deflow.imports import quick_imports


@entry_point("train_expert")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.data.generate.expert import train_expert

    train_expert(config.steps, Path(config.out), config.seed, config.episodes, config.overwrite)


if __name__ == "__main__":
    main()
