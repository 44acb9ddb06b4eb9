"""python benchmark.py [overrides] [--profile]: how fast everything is, as tables and as JSON."""

from deflow.commands import benchmark

if __name__ == "__main__":
    benchmark()
