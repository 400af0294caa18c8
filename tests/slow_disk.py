"""A disk that takes its time: a library, compiled here, that is loaded before the system's and waits in what syncs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static void pause_a_while(void) {
    const char *text = getenv("SLOW_DISK_MICROSECONDS");
    if (text) usleep(atoi(text));
}

#define SLOW(name)                                              \
    int name(int fd) {                                          \
        static int (*real)(int);                                \
        if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name); \
        pause_a_while();                                        \
        return real(fd);                                        \
    }

SLOW(fsync)
SLOW(fdatasync)
SLOW(syncfs)
"""


def slow_disk(folder: Path, seconds: float, patch: pytest.MonkeyPatch) -> None:
    """Servers that are started from here on wait so long in every sync. Skips the test without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for a disk that is slow")
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(_SOURCE)
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"cannot compile a disk that is slow: {done.stderr.strip()[:200]}")
    before = os.environ.get("LD_PRELOAD")
    patch.setenv("LD_PRELOAD", f"{library}:{before}" if before else str(library))
    patch.setenv("SLOW_DISK_MICROSECONDS", str(int(seconds * 1e6)))
