"""python evaluate.py ckpt=PATH [overrides]: play a checkpoint's policy again."""

from deflow.commands import evaluate

if __name__ == "__main__":
    evaluate()
