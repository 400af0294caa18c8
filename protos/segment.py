"""Memory that a server and a trainer share: how it is made, handed over, and checked before it is mapped.

A segment is an anonymous file in memory (`memfd_create`). It has no name that could be left behind: it is gone
with the last process that has it open or mapped, however that ended. Nor does the size of /dev/shm limit it.
It is sealed, so that nobody can shrink it under the feet of those who read it.
"""

import ctypes
import errno
import fcntl
import math
import mmap
import os
import threading
import weakref
from collections import OrderedDict, defaultdict, deque

import torch

PAGE = 4096

_MAX_SEGMENT_BYTES = 1 << 46
_KEEP_BYTES = 64 << 20
_ADDRESS_SPACE_FACTOR = 4
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, which `mmap` does not name."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Mapping:
    """A file in this process's memory, for as long as this object lives. Unlike `mmap.mmap` it keeps no file open.

    Raises OSError.
    """

    def __init__(self, fd: int, size: int, protection: int) -> None:
        address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address: int = address
        weakref.finalize(self, _libc.munmap, address, size).atexit = False
        # Where the system has them for shared memory.
        self.advise(mmap.MADV_HUGEPAGE, 0, size)

    def advise(self, advice: int, offset: int, size: int) -> int:
        """0, or the number of the error."""
        return 0 if _libc.madvise(self.address + offset, size, advice) == 0 else ctypes.get_errno()

    def block(self, offset: int, size: int) -> tuple[torch.Tensor, object]:
        """A part as a 1-d uint8 tensor, and an object that lives as long as its memory does, as does the mapping.

        Expects at least one byte.
        """
        memory = (ctypes.c_char * size).from_address(self.address + offset)
        memory.mapping = self  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=torch.uint8), memory


class Segment:
    """A segment of another process, to be read where it is.

    Pages that were read stay mapped: to map them for each copy, or to have the system copy them from the file, takes
    half as long again as the copy itself. They count as resident in this process, too, as shared memory.
    """

    def __init__(self, fd: int) -> None:
        """Maps and closes `fd`. Raises ValueError for a file that could fail under its readers, and OSError."""
        try:
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0
            self.size = os.fstat(fd).st_size
            if not seals & fcntl.F_SEAL_SHRINK or not 0 < self.size <= _MAX_SEGMENT_BYTES:
                raise ValueError("it is no sealed segment")
            self._bytes = _Mapping(fd, self.size, mmap.PROT_READ).block(0, self.size)[0]
        finally:
            os.close(fd)

    def tensor(self, offset: int, size: int) -> torch.Tensor:
        """A part as a 1-d uint8 tensor, which must not be written to. Raises ValueError if it is not in there."""
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f"{size} bytes at {offset} are not in a segment of {self.size}")
        return self._bytes.narrow(0, offset, size)


class Arena:
    """A segment of this process's own, from which memory is taken. Safe to use from all threads.

    Takes address space for several times what the machine has, and memory only for what is in use.

    fd: to hand to another process, which may map it but not write to it; closed by `stop_handing_over`.
    limit_bytes: what is free gives its memory back where that and what is in use are more together.
    """

    def __init__(self, size: int | None = None) -> None:
        """Raises OSError where the system gives no such memory."""
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.size = _aligned(size or _ADDRESS_SPACE_FACTOR * physical)
        writable = os.memfd_create("zero-ps", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(writable, self.size)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = _Mapping(writable, self.size, mmap.PROT_READ | mmap.PROT_WRITE)
            # Anonymous files are made with every right for everybody.
            os.fchmod(writable, 0o400)
            self.fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(writable)
        self.stop_handing_over = weakref.finalize(self, os.close, self.fd)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._end = 0
        # What may be taken again: by offset its size, with its memory, longest unused first; and by size the
        # offsets of what has none.
        self._warm: OrderedDict[int, int] = OrderedDict()
        self._cold: defaultdict[int, list[int]] = defaultdict(list)
        self._warm_bytes = 0
        self.limit_bytes = math.inf
        self.used_bytes = 0
        # What was freed, by whichever thread let go of it last, and is still to be noted.
        self._freed: deque[tuple[int, int]] = deque()

    def take(self, nbytes: int) -> torch.Tensor:
        """A 1-d uint8 tensor with anything in it. Its memory is free again when no tensor refers to it any more.

        Raises MemoryError.
        """
        if os.getpid() != self._pid:
            raise MemoryError("this process was forked from the one whose memory this is")
        size = _aligned(max(1, nbytes))
        with self._lock:
            self._collect()
            offset = next((offset for offset, free in reversed(self._warm.items()) if free == size), -1)
            if offset >= 0:
                del self._warm[offset]
                self._warm_bytes -= size
            else:
                offset = self._fresh(size)
            self.used_bytes += size
        tensor, memory = self._mapping.block(offset, max(1, nbytes))
        # Calls a method of this arena, which lives at least that long.
        weakref.finalize(memory, self._free, offset, size).atexit = False
        return tensor.narrow(0, 0, nbytes)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where a contiguous tensor's bytes are in this arena; None if they are elsewhere."""
        offset = tensor.data_ptr() - self._mapping.address
        return offset if 0 <= offset <= offset + tensor.nbytes <= self.size else None

    def _fresh(self, size: int) -> int:
        if cold := self._cold[size]:
            offset = cold.pop()
        elif self._end + size <= self.size:
            offset, self._end = self._end, self._end + size
        else:
            raise MemoryError(f"all of the {self.size} bytes of a segment are in use")
        # Better an error here than a signal at the first access. Linux before 5.14 knows no such advice.
        error = self._mapping.advise(_POPULATE_WRITE, offset, size)
        if error not in (0, errno.EINVAL):
            self._cold[size].append(offset)
            raise MemoryError(f"no memory for {size} bytes to share: {os.strerror(error)}")
        return offset

    def _free(self, offset: int, size: int) -> None:
        """Called wherever the garbage collector finds it, so that nothing may be waited for here."""
        if os.getpid() != self._pid:
            # A fork's copy of the tensor is gone; the parent still has its own.
            return
        self._freed.append((offset, size))
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._freed:
            offset, size = self._freed.popleft()
            self.used_bytes -= size
            self._warm[offset] = size
            self._warm_bytes += size
        while self._warm_bytes > min(_KEEP_BYTES, max(0, self.limit_bytes - self.used_bytes)):
            offset, size = self._warm.popitem(last=False)
            self._warm_bytes -= size
            self._mapping.advise(mmap.MADV_REMOVE, offset, size)
            self._cold[size].append(offset)


def _aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE
