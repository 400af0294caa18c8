"""Who may call what: one row for each call of the service."""

import enum
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ps.errors import AccessDenied, Unauthenticated
from ps.rarely import Rarely
from ps.sessions import Session
from ps.tokens import Right, Rules, Tokens
from ps.watched import Watched

_log = logging.getLogger(__name__)


class Of(enum.Enum):
    """On what the caller has to have a right."""

    SOME_JOB = "some job"
    """Any: the call tells nothing of jobs, or only of those that the caller may read."""

    NEW_SESSION = "the job of a session that is opened"
    """A read-only session takes `read`, any other one `train`."""

    SESSION = "the job of the session that is named"
    """The session has to be the caller's own, and is not enough by itself: one of a trainer takes `train` for all
    calls, and a read-only one makes none of those that take `train`, whatever its token could do besides."""


@dataclass(frozen=True)
class Row:
    right: Right
    of: Of = Of.SESSION


CALLS: Mapping[str, Row] = {
    "Status": Row(Right.READ, Of.SOME_JOB),
    "PrepareLink": Row(Right.READ, Of.SOME_JOB),
    "OpenSession": Row(Right.READ, Of.NEW_SESSION),
    "JoinGroup": Row(Right.TRAIN, Of.NEW_SESSION),
    "EndGroup": Row(Right.TRAIN),
    "Heartbeat": Row(Right.READ),
    "CloseSession": Row(Right.READ),
    # A read-only session changes nothing that anybody has in memory by these two, see `restore` and `open_job`.
    "Restore": Row(Right.READ),
    "OpenJob": Row(Right.READ),
    "Pull": Row(Right.READ),
    "Plan": Row(Right.READ),
    "ListState": Row(Right.READ),
    "Barrier": Row(Right.TRAIN),
    "SetOptimizer": Row(Right.TRAIN),
    "Push": Row(Right.TRAIN),
    "ZeroGrad": Row(Right.TRAIN),
    "GradNorm": Row(Right.TRAIN),
    "Step": Row(Right.TRAIN),
    "AnnounceStep": Row(Right.TRAIN),
    "Commit": Row(Right.TRAIN),
    "ClearState": Row(Right.TRAIN),
}
"""By the name of the call. Calls of other services are for administrators, but for health checks, which are free, and
watching health, which any token will do for."""


class Access:
    """Compares calls with what the tokens file allows. Everything here raises Unauthenticated or AccessDenied."""

    def __init__(self, tokens: Watched[Tokens]) -> None:
        self._tokens = tokens
        self.refusals = Rarely(_log, "refused %d calls without a valid token, the last from %s")

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Rules:
        """Whose token a call brings along."""
        given = [value for key, value in metadata if key == "authorization"]
        if not given:
            raise Unauthenticated(
                "this server asks for a token, and the call brought none: name the file that has yours, with "
                "trainer.Credentials(token_file=...), --token-file or ZERO_PS_TOKEN_FILE"
            )
        rules = None
        if len(given) == 1 and isinstance(given[0], str):
            scheme, _, token = given[0].partition(" ")
            if scheme.lower() == "bearer":
                rules = self._tokens.value.find(token.strip())
        if rules is None:
            raise Unauthenticated(
                "this server does not know the token that the call brought: it lists tokens in the file that "
                "'zero-ps serve --tokens' names"
            )
        return rules

    def check_call(self, method: str, caller: Rules) -> None:
        """Whether the caller might ever call this; for what is known before there is a request."""
        row = CALLS[method]
        # Who opens a session is told which right on which job is missing.
        right = Right.READ if row.of is Of.NEW_SESSION else row.right
        if not caller.allows_some(right):
            raise AccessDenied(
                f"{method} takes the right '{right.name.lower()}' on a job, which this token has on none"
            )

    def check_new_session(self, method: str, caller: Rules, job: str, read_only: bool) -> None:
        self._check(caller, Right.READ if read_only else Right.TRAIN, job, method)

    @staticmethod
    def take(session: Session, caller: Rules) -> None:
        """Makes a session that was just opened the caller's, unless it is somebody else's already."""
        if session.owner not in (b"", caller.identity):
            raise AccessDenied(f"the session of {session.who} of job {session.job!r} was begun with another token")
        session.owner = caller.identity

    def check_session(self, method: str, identity: bytes, session: Session | None) -> None:
        """identity: of the caller. session: None where the server knows none of that id, which is for the call itself
        to say."""
        row = CALLS[method]
        # The file may have changed since a stream began.
        current = self._tokens.value.known(identity)
        if current is None:
            raise Unauthenticated("this server does not know the token any more that the call came with")
        if session is None:
            self.check_call(method, current)
            return
        if session.owner != identity:
            raise AccessDenied(f"{method} names a session that was opened with another token")
        if session.read_only and row.right > Right.READ:
            raise AccessDenied(
                f"{method} takes the right '{row.right.name.lower()}', and this session is read-only; connect without "
                "read_only"
            )
        self._check(current, row.right if session.read_only else max(row.right, Right.TRAIN), session.job, method)

    def check_administrator(self, caller: Rules, what: str) -> None:
        if not caller.allows_all(Right.ADMIN):
            raise AccessDenied(f"{what} takes the right 'admin' on all jobs ('TOKEN admin *'), which this token lacks")

    @staticmethod
    def _check(caller: Rules, right: Right, job: str, method: str) -> None:
        if not caller.allows(right, job):
            raise AccessDenied(
                f"{method} takes the right '{right.name.lower()}' on job {job[:100]!r}, which this token has not; ask "
                "who runs the server for a rule in its --tokens file"
            )
