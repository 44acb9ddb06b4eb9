"""The optimizers that a configuration may name: per parameter, so that one optimizer equals one for each part."""

OPTIMIZERS = (
    "torch.optim.Adam",
    "torch.optim.AdamW",
    "torch.optim.NAdam",
    "torch.optim.RAdam",
    "torch.optim.RMSprop",
    "torch.optim.SGD",
)
