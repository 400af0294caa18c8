"""What can go wrong in a trainer, by what a caller can do about it."""


class ZeroPsError(RuntimeError):
    """Base class of every error that this package raises on its own account."""


class ConfigError(ZeroPsError, ValueError):
    """An argument or a setting that cannot work; nothing was changed."""


class OutOfBudget(ConfigError):
    """A module's parameters cannot be whole at once within the limits that were set."""


class ConnectError(ZeroPsError):
    """A server cannot be reached, is not the one that was expected, or went away."""


class ServerLost(ConnectError):
    """A server does not answer, or stopped answering: it may come back."""


class NoCommonState(ConnectError):
    """The servers hold nothing from which the job can go on."""


class SessionLost(ZeroPsError):
    """A server does not know this trainer's session any more: its lease ran out, or the server was started anew."""


class RequestRefused(ZeroPsError):
    """A server answered that a request is not valid in its present state; it says why."""


class AccessDenied(RequestRefused):
    """A server does not know this trainer's token, or the token has not the right that was needed."""


class TokenUnknown(AccessDenied):
    """A server does not know this trainer's token, or not any more: whoever runs it may put it back."""


class VersionGone(RequestRefused):
    """A server has gone on from the step that was asked for, as happens to readers of a job in training."""


class ServerFull(RequestRefused):
    """A server has not the memory, or not the places for jobs, sessions and calls, that a request takes."""


class ServerFailure(ZeroPsError):
    """A server could not do what it was asked: its disk failed, a stored file is damaged, an update raised."""


class JobMismatch(RequestRefused):
    """The model or the optimizer is not the one that the job on the servers was made with."""


class TrainerLost(ZeroPsError):
    """Another trainer of the job is gone, so what this one waited for will not come."""


class StepHalfDone(ZeroPsError):
    """A step that was announced broke off after some parameters may have been updated: go back to a commit."""


class DeadlineExceeded(ZeroPsError, TimeoutError):
    """Something did not happen in time; the message names it."""


class ReleasedParameterError(ZeroPsError):
    """A released parameter was used where nothing gathers it."""


class ModifiedParameterError(ZeroPsError):
    """A gathered parameter was changed where changes are not kept."""
