"""python generate.py dataset=NAME out=DIR [overrides]: make a data set with OGBench's own recipe."""

from deflow.commands import generate

if __name__ == "__main__":
    generate()
