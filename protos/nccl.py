"""The few functions of NCCL that a pair takes, by ctypes from the library that torch brings along.

torch's own ProcessGroupNCCL is not used: it has a watchdog that ends the process when one of its peers dies, and it
wants a store. Communicators are non-blocking here, so that no call waits for the other end; whoever waits polls.
"""

import ctypes
import functools
import threading
import time

import torch

LIBRARY = "libnccl.so.2"

ID_BYTES = 128

_SUCCESS, _INVALID_USAGE, _IN_PROGRESS = 0, 5, 7
_UINT8 = 1

_OLDEST = 22700
"""torch 2.9 has it. Before it, what a thread has begun with a communicator could not be aborted by another."""

_CONFIG_VERSION = 21800
"""Of `Config`. With this one newer libraries do not look at what came later."""

_MAGIC = 0xCAFEBEEF
_UNDEFINED = -(1 << 31)

_POLL_SECONDS = 0.0002

_Handle = ctypes.c_void_p


class _Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]


class Config(ctypes.Structure):
    """`ncclConfig_t` as of NCCL 2.18. A newer library sees from `size` and `version` what is not there."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    ]

    @classmethod
    def not_blocking(cls) -> "Config":
        return cls(ctypes.sizeof(cls), _MAGIC, _CONFIG_VERSION, 0, _UNDEFINED, _UNDEFINED, _UNDEFINED, None, _UNDEFINED)


_SIGNATURES = {
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(_Id)],
    "ncclCommInitRankConfig": [ctypes.POINTER(_Handle), ctypes.c_int, _Id, ctypes.c_int, ctypes.POINTER(Config)],
    "ncclCommGetAsyncError": [_Handle, ctypes.POINTER(ctypes.c_int)],
    "ncclSend": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _Handle, ctypes.c_void_p],
    "ncclRecv": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _Handle, ctypes.c_void_p],
    "ncclCommAbort": [_Handle],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
}


class Nccl:
    """The library. Raises OSError where there is none, or one that is too old."""

    def __init__(self, name: str = LIBRARY) -> None:
        try:
            # The one that torch has loaded, if it has.
            self._library = ctypes.CDLL(name)
            for function, arguments in _SIGNATURES.items():
                declared = getattr(self._library, function)
                declared.argtypes, declared.restype = arguments, ctypes.c_int
            self._library.ncclGetErrorString.argtypes = [ctypes.c_int]
            self._library.ncclGetLastError.argtypes = [_Handle]
        except (OSError, AttributeError) as error:
            raise OSError(f"NCCL cannot be used: {error}") from None
        for function in ("ncclGetErrorString", "ncclGetLastError"):
            getattr(self._library, function).restype = ctypes.c_char_p
        found = ctypes.c_int()
        self.check(self._library.ncclGetVersion(ctypes.byref(found)), "ncclGetVersion")
        self.version = found.value
        if self.version < _OLDEST:
            raise OSError(f"NCCL {version_text(self.version)} is too old; it takes {version_text(_OLDEST)} or newer")

    def call(self, function: str, *arguments: object) -> int:
        """What a function answers: success, or that it is in progress. Raises RuntimeError for anything else."""
        return self.check(getattr(self._library, function)(*arguments), function)

    def check(self, result: int, what: str) -> int:
        if result not in (_SUCCESS, _IN_PROGRESS):
            said = [self._library.ncclGetErrorString(result), self._library.ncclGetLastError(None)]
            text = f"{what}: {': '.join(each.decode(errors='replace').strip() for each in said if each)}"
            if result == _INVALID_USAGE:
                # NCCL sees one host with one GPU twice.
                text += "; where server and trainer use the same GPU, each needs an NCCL_HOSTID of its own"
            raise RuntimeError(text)
        return result

    def unique_id(self) -> bytes:
        """By which the two ends of a communicator find each other. Whoever makes it has to be reached by the other."""
        found = _Id()
        self.call("ncclGetUniqueId", ctypes.byref(found))
        return bytes(found)


@functools.cache
def library() -> Nccl:
    """Raises OSError."""
    return Nccl()


def version_text(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def why_not() -> str:
    """Why there is no NCCL for this process; empty if there is."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    try:
        library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


class Communicator:
    """A communicator of two whose rank 0 sends and whose rank 1 receives. Safe to use from several threads."""

    def __init__(self, device: torch.device, unique_id: bytes, rank: int, seconds: float) -> None:
        """Returns when the other end has done the same. Raises RuntimeError where it does not within `seconds`."""
        self._nccl = library()
        self._device = device
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._handle: ctypes.c_void_p | None = _Handle()
        config = Config.not_blocking()
        try:
            with torch.cuda.device(device):
                self._nccl.call(
                    "ncclCommInitRankConfig",
                    ctypes.byref(self._handle),
                    2,
                    _Id.from_buffer_copy(unique_id),
                    rank,
                    ctypes.byref(config),
                )
            self._settle(seconds)
        except BaseException:
            Communicator.abort(self)
            raise

    def send(self, address: int, nbytes: int, stream: int, seconds: float) -> None:
        """Has a stream send device memory. The first one returns when the other end receives it."""
        self._move("ncclSend", address, nbytes, stream, seconds)

    def receive(self, address: int, nbytes: int, stream: int, seconds: float) -> None:
        self._move("ncclRecv", address, nbytes, stream, seconds)

    def _move(self, function: str, address: int, nbytes: int, stream: int, seconds: float) -> None:
        with self._lock, torch.cuda.device(self._device):
            self._nccl.call(function, address, nbytes, _UINT8, self._peer, self._open(), stream)
        self._settle(seconds)

    def _settle(self, seconds: float) -> None:
        """Returns when what was called last is in the stream."""
        end = time.monotonic() + seconds
        while not self.settled():
            if time.monotonic() > end:
                raise RuntimeError(f"the other end did not take part within {seconds:g} s")
            time.sleep(_POLL_SECONDS)

    def settled(self) -> bool:
        """Whether nothing is in progress but what streams do. Raises RuntimeError for what has gone wrong since."""
        state = ctypes.c_int()
        with self._lock:
            self._nccl.call("ncclCommGetAsyncError", self._open(), ctypes.byref(state))
        return self._nccl.check(state.value, "NCCL") == _SUCCESS

    @staticmethod
    def abort(*communicators: "Communicator") -> None:
        """Has streams stop what they do for communicators of one device, and frees these. Safe to call twice.

        That waits until the device has done all that it was asked for, whoever asked. So all that depend on each
        other have to be told to stop before the first one is freed, as a group of calls does.
        """
        told = [(each, handle) for each in communicators if (handle := each._take())]
        if not told:
            return
        library, device = told[0][0]._nccl, told[0][0]._device
        with torch.cuda.device(device):
            library.call("ncclGroupStart")
            try:
                for _, handle in told:
                    library.call("ncclCommAbort", handle)
            finally:
                library.call("ncclGroupEnd")

    def _take(self) -> ctypes.c_void_p | None:
        """The handle, which nobody uses any more; None if there is none."""
        with self._lock:
            handle, self._handle = self._handle, None
        return handle or None

    def _open(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise RuntimeError("this end has left the pair")
        return self._handle
