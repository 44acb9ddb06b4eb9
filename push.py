"""python push.py ckpt=PATH to=ADDRESS: share a policy, on Hugging Face's hub or in MLflow's registry."""

from deflow.commands import push

if __name__ == "__main__":
    push()
