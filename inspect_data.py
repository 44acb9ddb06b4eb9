"""python inspect_data.py data=CHOICE task=CHOICE [overrides]: a data card, with warnings for known faults."""

from deflow.commands import inspect_data

if __name__ == "__main__":
    inspect_data()
