"""Which classes of `torch.optim` servers run, and why not the others."""

ALLOWED = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "RMSprop",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adadelta",
    "ASGD",
    "Rprop",
)
"""Those that treat every element by itself, and so do the same on any chunk: all of torch 2.9 to 2.13."""

REFUSED = {
    "LBFGS": "it evaluates the whole model several times a step",
    "Muon": "it orthogonalises whole matrices, whose chunks are on several servers",
    "Adafactor": "it keeps statistics of whole rows and columns",
    "SparseAdam": "it needs sparse gradients",
}


def check_optimizer(name: str) -> None:
    """Raises ValueError, saying why and naming the allowed classes."""
    if name not in ALLOWED:
        reason = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise ValueError(
            f"optimizer {name!r} cannot run on the servers{reason}: it has to be an element-wise class of "
            f"torch.optim, one of {', '.join(ALLOWED)}"
        )
