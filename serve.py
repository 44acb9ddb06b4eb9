"""python serve.py ckpt=PATH [port=PORT]: let robots and other programs ask a policy."""

from deflow.commands import serve

if __name__ == "__main__":
    serve()
