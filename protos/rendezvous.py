"""How the two ends of a `shm` link find each other: over a socket that only processes of one host and user reach.

The server listens on an abstract Unix socket of sequenced packets. A trainer connects to it before it opens its
session and sends a token, with its own segment's file descriptor; the token in `LinkOffer` tells the server which
connection is whose. Once the link is chosen the server sends the descriptors of its segment and of two
streams, for pulls and pushes (`local_messages`), and from then on the trainer says over the connection how many
regions it has read since the beginning. The end of the connection tells each side that
the other is gone, however it ended.
"""

import os
import secrets
import socket
import struct

_COUNT = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("iII")
_MAX_PACKET_BYTES = 256


def this_host() -> str:
    """Tells this host from every other one, and from itself before it was started anew."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def listen() -> tuple[socket.socket, str]:
    """A socket that listens, and its address as `connect` takes it. Raises OSError."""
    name = f"zero-ps-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{name}")
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener, f"{this_host()}/{name}"


def connect(address: str, timeout: float) -> socket.socket:
    """Connects to a server's socket. Raises OSError, with words of ours for what is no fault of the system."""
    host, _, name = address.partition("/")
    if not name or host != this_host():
        raise OSError("the server runs on another host")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout)
        connection.connect(f"\0{name}")
        check_peer(connection)
    except ConnectionRefusedError:
        connection.close()
        raise OSError("the server's socket cannot be reached from here, as from another container") from None
    except BaseException:
        connection.close()
        raise
    return connection


def check_peer(connection: socket.socket) -> None:
    """Raises PermissionError unless the process at the other end is of this one's user."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise PermissionError(f"trainer and server are of different users ({uid} and {os.geteuid()})")


def send_files(connection: socket.socket, word: str, *fds: int) -> None:
    socket.send_fds(connection, [word.encode("ascii")], fds)


def receive_files(connection: socket.socket, count: int) -> tuple[str, list[int]]:
    """What the other end sent with `send_files`. Raises OSError when it sent something else, or nothing."""
    data, fds, _, _ = socket.recv_fds(connection, _MAX_PACKET_BYTES, count, socket.MSG_CMSG_CLOEXEC)
    if len(fds) != count:
        for fd in fds:
            os.close(fd)
        raise OSError(
            "the other end closed the connection" if not data else f"the other end sent {len(fds)} files, not {count}"
        )
    return data.decode("ascii", "replace"), fds


def encode_count(count: int) -> bytes:
    return _COUNT.pack(count)


def decode_count(packet: bytes) -> int:
    """Raises ValueError."""
    if len(packet) != _COUNT.size:
        raise ValueError(f"a packet of {len(packet)} bytes is no count")
    count: int = _COUNT.unpack(packet)[0]
    return count
