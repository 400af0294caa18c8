"""Answers the Pull and Push streams of one session that come another way than over gRPC, with the same rights."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from protos import frames
from protos import zero_ps_pb2 as pb
from protos.local_messages import StreamError
from ps.access import Access
from ps.errors import InvalidRequest
from ps.guard import head_of
from ps.jobs import Jobs
from ps.pull import answer_pulls
from ps.push import answer_pushes
from ps.sessions import Session
from ps.statuses import stream_error
from ps.traffic import Traffic
from ps.unreadable import MAX_REQUEST_BYTES, Message, Unreadable, readable, reader


@contextmanager
def _told() -> Iterator[None]:
    """What ends a stream is something that its trainer can be told."""
    try:
        yield
    except Exception as error:
        raise StreamError(stream_error(error)) from error


class SessionStreams:
    """What a link hands its requests to. Each method returns the answers, in order, until the requests end.

    cancel: ends the stream from another thread. cancelled: whether the trainer is gone.
    """

    def __init__(self, jobs: Jobs, traffic: Traffic, session: Session, access: Access | None) -> None:
        self._jobs = jobs
        self._traffic = traffic
        self._session = session
        self._access = access

    def pull(
        self, messages: Iterable[bytes], cancel: Callable[[], None], cancelled: Callable[[], bool]
    ) -> Generator[bytes, None, None]:
        requests = self._requests("Pull", pb.PullRequest.FromString, messages)
        with _told(), self._jobs.places.stream(cancel, self._session) as place:
            yield from map(frames.encode, answer_pulls(self._jobs, self._traffic, requests, place, cancelled))

    def push(
        self, messages: Iterable[bytes], cancel: Callable[[], None], cancelled: Callable[[], bool]
    ) -> Generator[bytes, None, None]:
        requests = self._requests("Push", frames.decode_push, messages)
        with _told(), self._jobs.places.stream(cancel, self._session) as place:
            for response in answer_pushes(self._jobs, self._traffic, requests, place, cancelled):
                yield response.SerializeToString()

    def _requests(
        self, method: str, decode: Callable[[bytes], Message], messages: Iterable[bytes]
    ) -> Iterator[Message]:
        """Raises what ends the stream: InvalidRequest, AccessDenied, Unauthenticated."""
        read: Callable[[bytes], Message | Unreadable] = reader(method, decode, MAX_REQUEST_BYTES)
        for request in readable(map(read, messages)):
            if (head := head_of(request)) is not None:
                if head.session_id != self._session.id:
                    raise InvalidRequest("a stream over a link is for the requests of that link's session alone")
                if self._access is not None:
                    self._access.check_session(method, self._session.owner, self._session)
            yield request
