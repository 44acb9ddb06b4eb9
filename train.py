"""python train.py experiment=NAME [overrides]: train, evaluate and report a policy."""

from deflow.commands import train

if __name__ == "__main__":
    train()
