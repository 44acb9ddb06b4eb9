"""python distill.py ckpt=PATH [overrides]: train a one-step generator of a trained policy; resume=FOLDER goes on."""

from deflow.commands import distill

if __name__ == "__main__":
    distill()
