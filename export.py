"""python export.py ckpt=PATH [overrides]: write a checkpoint's policy as one file for the robot."""

from deflow.commands import export

if __name__ == "__main__":
    export()
