"""Training with parameters that live on parameter servers.

    job = trainer.connect("10.0.0.1:7070,10.0.0.2:7070", job="gpt")
    with job.init():
        model = GPT(config)
    trainer.offload(model, job)
    optimizer = trainer.RemoteOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-4)

The model stays a plain `nn.Module` and the training loop stays the user's.
"""

from protos.credentials import Credentials
from trainer.clipping import clip_grad_norm_, clip_grad_value_
from trainer.commit import Commit
from trainer.config import OffloadConfig
from trainer.connect import connect
from trainer.ema import ema_weights
from trainer.errors import (
    AccessDenied,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    JobMismatch,
    ModifiedParameterError,
    OutOfBudget,
    ReleasedParameterError,
    RequestRefused,
    ServerFailure,
    ServerFull,
    SessionLost,
    StepHalfDone,
    TrainerLost,
    ZeroPsError,
)
from trainer.gathering import gathered
from trainer.job import Job
from trainer.layers import layer_by_layer
from trainer.offload import offload, release, remove
from trainer.optimizer import RemoteOptimizer
from trainer.report import Report, record_timeline, report

__all__ = [
    "AccessDenied",
    "Commit",
    "ConfigError",
    "ConnectError",
    "Credentials",
    "DeadlineExceeded",
    "Job",
    "JobMismatch",
    "ModifiedParameterError",
    "OffloadConfig",
    "OutOfBudget",
    "ReleasedParameterError",
    "RemoteOptimizer",
    "Report",
    "RequestRefused",
    "ServerFailure",
    "ServerFull",
    "SessionLost",
    "StepHalfDone",
    "TrainerLost",
    "ZeroPsError",
    "clip_grad_norm_",
    "clip_grad_value_",
    "connect",
    "ema_weights",
    "gathered",
    "layer_by_layer",
    "offload",
    "record_timeline",
    "release",
    "remove",
    "report",
]
