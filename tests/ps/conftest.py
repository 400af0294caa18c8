"""What all tests of the server share."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import protos.layout
from tests.ps.client import Client


@pytest.fixture(autouse=True)
def _clients_leave() -> Iterator[None]:
    """The clients of a test do not outlive it."""
    yield
    while Client.connected:
        Client.connected.pop().drop()


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of a few KiB, so that a small model has many. For what a test does in its own process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protos.layout, "CHUNK_BYTES", 4 << 10)
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB. Mounting needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
