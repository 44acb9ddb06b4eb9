"""`python -m deflow` is the command `deflow`."""

from deflow.commands import console

if __name__ == "__main__":
    console()
