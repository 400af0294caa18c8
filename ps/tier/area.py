"""The spill files of one shard or session, in `<data-dir>/<job>/working/`: a plain zarr group, as generations are.

A generation may link to any of these files, so a file that has its name is never written again. A spill goes
to a nameless one, which then changes places with what was there before. What was there is written over by
the next spill if nothing else links to it: blocks that a file has already take a write at nearly twice the
speed at which new ones do (measured: 2.5 against 1.4 GB/s).

Nothing here outlives the process: the folder is emptied when a server starts.
"""

import ctypes
import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ps.errors import StorageFailed
from ps.store import checksum, direct, durable
from ps.store.arrays import METADATA_FILE, ChunkedArray, group_metadata
from ps.store.errors import GO_BACK

_EXCHANGE = 2
_AT_CWD = -100
_FULL = (errno.ENOSPC, errno.EDQUOT)

_REMEDY = "the last commit is untouched"


class Area:
    """A folder for spill files, made when the first is written. Methods may be called from several threads."""

    _numbers = itertools.count()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Told why when something cannot be read back: what depends on it is lost.
        self.on_loss: Callable[[str], None] = lambda why: None
        self._lock = threading.Lock()
        self._dropped = False
        self._arrays: set[str] = set()
        # By size: files whose bytes nobody needs.
        self._spare: dict[int, list[str]] = {}

    def path(self, array: ChunkedArray, chunk: int) -> str:
        return f"{self.folder}/{array.chunk_key(chunk)}"

    def read(self, array: ChunkedArray, chunk: int, into: memoryview, size: int, label: str) -> None:
        """What was spilled. Raises StorageFailed, naming the file."""
        path = self.path(array, chunk)
        with self._loss(label, path, f"{_REMEDY.capitalize()}: start the trainers again, and they go on from there"):
            direct.read_file(path, into, size, array.chunk_bytes)

    def read_committed(
        self,
        array: ChunkedArray,
        chunk: int,
        into: memoryview,
        size: int,
        label: str,
        source: Path,
        crc32c: int | None,
    ) -> None:
        """What was linked from `source`. crc32c: of the file, to be compared; None if that is not wanted.

        Raises StorageFailed, naming the file in the generation.
        """
        with self._loss(label, source, f"{GO_BACK[0].upper()}{GO_BACK[1:]}; then start the trainers again"):
            direct.read_file(self.path(array, chunk), into, size, array.chunk_bytes)
            if crc32c is not None:
                found = checksum.crc32c(torch.frombuffer(into[:size], dtype=torch.uint8), array.chunk_bytes)
                if found != crc32c:
                    raise ValueError(f"its CRC32C is {found:08x}, and it was written with {crc32c:08x}")

    @contextmanager
    def _loss(self, label: str, file: Path | str, remedy: str) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            why = (
                f"cannot read {label} back from {file}: {reason}; the state of this server is not whole without it. "
                f"{remedy}"
            )
            self.on_loss(why)
            raise StorageFailed(why) from error

    def write(self, array: ChunkedArray, chunk: int, data: memoryview, size: int, label: str) -> None:
        """Raises StorageFailed, naming the file. What was there before stays if it fails."""
        path = self.path(array, chunk)
        try:
            self._make_array(array)
            fresh = self._take_spare(array.chunk_bytes)
            try:
                direct.write_file(fresh, data, size, array.chunk_bytes)
                self._put_in_place(fresh, path, array.chunk_bytes)
            except BaseException:
                with suppress(OSError):
                    os.unlink(fresh)
                raise
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in _FULL:
                self._drop_spares()
                raise StorageFailed(
                    f"cannot spill {label} to {path}: the disk is full ({reason}). {_REMEDY.capitalize()}: free some "
                    "space, or give the server more --memory, and start the trainers again"
                ) from error
            raise StorageFailed(
                f"cannot spill {label} to {path}: {reason}. {_REMEDY.capitalize()}: check that the folder is writable "
                "and its disk healthy, and start the trainers again"
            ) from error

    def link(self, array: ChunkedArray, chunk: int, source: Path, label: str) -> None:
        """Gives a committed file its place here, too, so that it stays when its generation is deleted.

        Where the disk cannot link, it is copied. Raises StorageFailed.
        """
        target = self.path(array, chunk)
        try:
            self._make_array(array)
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            durable.link_or_copy(source, target)
        except OSError as error:
            raise StorageFailed(
                f"cannot link {label} from {source} to {target}: {error.strerror or error}; {GO_BACK}"
            ) from error

    def take(self, path: str, array: ChunkedArray, chunk: int, label: str) -> None:
        """Moves a file in that has the chunk's bytes and perhaps not its padding. Raises StorageFailed."""
        target = self.path(array, chunk)
        try:
            self._make_array(array)
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            os.truncate(path, array.chunk_bytes)
            try:
                os.rename(path, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.move(path, target)
        except OSError as error:
            raise StorageFailed(
                f"cannot move {label} from {path} to {target}: {error.strerror or error}; build the model again"
            ) from error

    def discard(self, array: ChunkedArray, chunk: int) -> None:
        """The file is of no more use; its blocks are, to the next spill."""
        spare = self._spare_name()
        with suppress(OSError):
            os.rename(self.path(array, chunk), spare)
            self._keep_spare(spare, array.chunk_bytes)

    def drop(self) -> None:
        """Deletes all of it. Writes that are still under way come to nothing."""
        with self._lock:
            self._dropped = True
            self._arrays.clear()
            self._spare.clear()
        doomed = self.folder.with_name(f"{self.folder.name}.dropped")
        with suppress(OSError):
            self.folder.rename(doomed)
            # Thousands of files take their time, which nobody has to wait for.
            threading.Thread(target=shutil.rmtree, args=(doomed, True), name="drop-area", daemon=True).start()

    def _make_array(self, array: ChunkedArray) -> None:
        with self._lock:
            if array.path in self._arrays:
                return
            if self._dropped:
                raise OSError(errno.ENOENT, "nobody needs it any more")
            folder = self.folder / array.path
            (folder / "c").mkdir(parents=True, exist_ok=True, mode=0o700)
            for group in (self.folder, (self.folder / array.path).parents[array.path.count("/") - 1]):
                with suppress(FileExistsError):
                    _write_new(group / METADATA_FILE, group_metadata({}))
            with suppress(FileExistsError):
                _write_new(folder / METADATA_FILE, array.metadata())
            self._arrays.add(array.path)

    def _take_spare(self, file_bytes: int) -> str:
        with self._lock:
            spare = self._spare.get(file_bytes)
            return spare.pop() if spare else self._spare_name()

    def _spare_name(self) -> str:
        return f"{self.folder}/.spare-{next(self._numbers)}"

    def _put_in_place(self, fresh: str, path: str, file_bytes: int) -> None:
        if _exchange(fresh, path):
            self._keep_spare(fresh, file_bytes)
            return
        try:
            os.rename(fresh, path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.rename(fresh, path)

    def _keep_spare(self, path: str, file_bytes: int) -> None:
        # It has no name any more under which a generation could link to it, so this count only falls.
        if os.stat(path).st_nlink > 1:
            os.unlink(path)
            return
        with self._lock:
            self._spare.setdefault(file_bytes, []).append(path)

    def _drop_spares(self) -> None:
        with self._lock:
            paths = [path for spare in self._spare.values() for path in spare]
            self._spare.clear()
        for path in paths:
            with suppress(OSError):
                os.unlink(path)


def _write_new(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)


_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _exchange(one: str, other: str) -> bool:
    """Whether two files changed names; not if one of them is missing or the system cannot."""
    if _renameat2 is None:
        return False
    result: int = _renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE)
    return result == 0
