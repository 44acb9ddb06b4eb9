"""python inspect_data.py data=CHOICE task=CHOICE [overrides]: a data card, with warnings for known faults."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point
from deflow.imports import quick_imports


@entry_point("inspect_data")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow import inspection

    inspection.inspect(config)


if __name__ == "__main__":
    main()
