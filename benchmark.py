"""python benchmark.py [overrides]: updates/s of the pipeline's own loop against a bare one, as a ratio in one run."""

from pathlib import Path

from omegaconf import DictConfig

from deflow.config import entry_point


@entry_point("benchmark")
def main(config: DictConfig, folder: Path) -> None:
    from deflow.benchmark import benchmark

    benchmark(config)


if __name__ == "__main__":
    main()
