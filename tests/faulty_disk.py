"""A disk that loses what is written on it: reads fail with an input/output error of the kernel.

It is a loop device. Where the file behind one is cut, the kernel cannot read any more what was there.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BLOCK = 4096
_FIBMAP = 1


class FaultyDisk:
    """folder: where the disk is mounted."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.folder = folder
        self._image = image

    def lose(self, file: Path) -> None:
        """From now on, what the disk has from the beginning of this file on cannot be read.

        Until something is written behind it. What was read before is not remembered.
        """
        subprocess.run(["sync", "--file-system", str(self.folder)], check=True)
        os.truncate(self._image, self.begin_of(file))
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def begin_of(self, file: Path) -> int:
        """Where on the disk a file is, in bytes."""
        with file.open("rb") as opened:
            blocks = range(-(-file.stat().st_size // BLOCK))
            found = [fcntl.ioctl(opened, _FIBMAP, struct.pack("i", block)) for block in blocks]
        return min(struct.unpack("i", block)[0] for block in found) * BLOCK


@contextlib.contextmanager
def faulty_disk(folder: Path, mebibytes: int) -> Iterator[FaultyDisk]:
    """Skips the test where such a disk cannot be made: that needs root, mkfs.ext4 and loop devices."""
    if os.getuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4 for a disk that fails")
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    # All that describes files comes first on so small a disk, and is not lost with them.
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-O", "^has_journal", str(image)], check=True)
    done = subprocess.run(["mount", "-o", "loop,noatime", str(image), str(mounted)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a disk that fails: {done.stderr.decode().strip()}")
    try:
        yield FaultyDisk(image, mounted)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
