"""python train_expert.py [overrides]: train a walking ant like the one that makes the antmaze data."""

from deflow.commands import train_expert

if __name__ == "__main__":
    train_expert()
