"""python reproduce.py table=NAME [overrides]: the runs of a published table, and ours beside the papers'."""

from deflow.commands import reproduce

if __name__ == "__main__":
    reproduce()
