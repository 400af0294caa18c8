"""A trainer's sessions with all servers and the links that go with them; they begin and end together."""

import time
from collections.abc import Sequence

from protos import zero_ps_pb2 as pb
from trainer.links import Candidates, Link, Outbox, Shared
from trainer.membership import Place, Wish, join_group
from trainer.server import Server, find_servers
from trainer.session import Session


class Connection:
    """servers, links, states: by shard. states: what each server had when its session was opened.

    place: among the trainers. outbox: memory that gradients leave from, if a link shares any.
    device: whose memory all links read and write where it is, besides the host's; None where they do not.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        session: Session,
        place: Place,
        links: Sequence[Link],
        outbox: Outbox | None,
    ) -> None:
        self.servers = servers
        self.session = session
        self.place = place
        self.states: Sequence[pb.OpenSessionResponse] = session.states
        self.links = links
        self.outbox = outbox
        devices = {link.device for link in links}
        self.device = devices.pop() if len(devices) == 1 else None

    def close(self, step: int = 0) -> None:
        """Leaves in order, having asked every server for the steps before `step`. Safe to call twice."""
        self._close_links()
        self.session.close(step)
        self._close_channels()

    def abandon(self, reason: str) -> None:
        """Leaves to join anew, which the other trainers have to do as well; reason: what they are told."""
        self.session.give_up(reason)
        self.drop()

    def drop(self) -> None:
        """Leaves without a word. Nothing of it touches the memory of parameters any more when this returns."""
        self.session.stop()
        self._close_links()
        self._close_channels()

    def _close_links(self) -> None:
        for link in self.links:
            link.close()
        self.outbox = None

    def _close_channels(self) -> None:
        for server in self.servers:
            server.close()


def open_connection(wish: Wish, former: Place | None, timeout: float, *, keep_session: bool = False) -> Connection:
    """Finds the servers, joins the other trainers, opens a session and a link with each server.

    former: this trainer's place before, if it was connected. timeout: seconds, for all of it.
    keep_session: the session of before lives on until the new group is formed.

    Raises ConnectError when servers cannot be reached or do not belong together, RequestRefused when they do not
    accept this trainer, TrainerLost when another one is lost meanwhile, DeadlineExceeded.
    """
    deadline = time.monotonic() + timeout

    def left() -> float:
        return max(0.1, deadline - time.monotonic())

    servers = find_servers(wish.addresses, wish.credentials, timeout)
    session: Session | None = None
    candidates: list[Candidates] = []
    shared = Shared()
    links: list[Link] = []
    try:
        place, lease = Place(0, 0, 0), None
        if not wish.read_only:
            place, lease = join_group(servers, wish, former, left(), keep_session=keep_session)
        # Its heartbeats begin at once: what is prepared for links may take longer than a lease.
        session = Session(servers, wish, place, lease)
        for server in servers:
            candidates.append(Candidates(server, shared, wish.kinds))
        session.open([each.offers for each in candidates], left())
        for each, state in zip(candidates, session.states, strict=True):
            links.append(each.open(state))
        outbox = shared.outbox if any(link.kind == "shm" for link in links) else None
        if shared.outbox is not None:
            shared.outbox.arena.stop_handing_over()
        return Connection(servers, session, place, links, outbox)
    except BaseException:
        for link in links:
            link.close()
        for each in candidates:
            each.close()
        if session is not None:
            session.close()
        for server in servers:
            server.close()
        raise
