"""python generate.py dataset=NAME out=DIR [overrides]: make a data set with OGBench's own recipe."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point
from deflow.imports import quick_imports


@entry_point("generate")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.data.generate.runner import generate_dataset

    path = generate_dataset(
        config.dataset,
        config.episodes,
        Path(config.out),
        config.seed,
        config.workers,
        config.steps,
        config.overwrite,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
