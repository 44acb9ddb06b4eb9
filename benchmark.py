"""python benchmark.py [overrides] [--profile]: how fast everything is, as tables and as JSON."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point
from deflow.imports import quick_imports


@entry_point("benchmark")
def main(config: DictConfig, folder: Path) -> None:
    with quick_imports():
        from deflow.benchmark import benchmark

    benchmark(config)


if __name__ == "__main__":
    sys.argv[1:] = ["profile=true" if argument == "--profile" else argument for argument in sys.argv[1:]]
    main()
