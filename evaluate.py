"""python evaluate.py ckpt=PATH [overrides]: play a checkpoint's policy again."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point
from deflow.imports import quick_imports


@entry_point("evaluate")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.evaluating import evaluate

    evaluate(config)


if __name__ == "__main__":
    main()
