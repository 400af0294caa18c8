"""What other processes have cost so far, as the system tells."""

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """Of all threads, in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def peak_bytes(pid: int) -> int:
    """The most resident memory since its start."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def lent_bytes(pid: int) -> int:
    """What is resident of memory that others lend to be read, as zero-ps servers do; it is theirs."""
    total, lent = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            lent = " r--s " in line and "/memfd:" in line
        elif lent and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@dataclass(frozen=True)
class Disk:
    """Bytes that a process has had read from and written to disks, not the page cache."""

    read: int = 0
    written: int = 0


def disk_bytes(pid: int) -> Disk:
    """Nothing where the system does not tell, as for processes of somebody else."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return Disk()
    found = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return Disk(found["read_bytes"], found["write_bytes"])


def disk_busy_seconds(folder: Path) -> float:
    """For how long the disk under a folder has had something to do; 0 where the system does not tell."""
    device = folder.stat().st_dev
    try:
        lines = Path("/proc/diskstats").read_text().splitlines()
    except OSError:
        return 0.0
    for fields in (line.split() for line in lines):
        if (int(fields[0]), int(fields[1])) == (os.major(device), os.minor(device)):
            return int(fields[12]) / 1e3
    return 0.0


@dataclass(frozen=True)
class Schedule:
    """Seconds of threads: on a processor, and ready to run while others had the processors."""

    running: float = 0.0
    ready: float = 0.0

    def __add__(self, other: "Schedule") -> "Schedule":
        return Schedule(self.running + other.running, self.ready + other.ready)

    def __sub__(self, other: "Schedule") -> "Schedule":
        return Schedule(self.running - other.running, self.ready - other.ready)


def schedule(task: str | int = "thread-self") -> Schedule:
    """Of the calling thread, or of all threads that a process has; nothing where the system does not tell."""
    if isinstance(task, str):
        return _schedule(Path("/proc") / task)
    total = Schedule()
    for thread in Path(f"/proc/{task}/task").iterdir():
        total += _schedule(thread)
    return total


def _schedule(folder: Path) -> Schedule:
    try:
        running, ready, _ = (folder / "schedstat").read_text().split()
    except OSError:
        # The thread has ended since, or the kernel does not count.
        return Schedule()
    return Schedule(int(running) / 1e9, int(ready) / 1e9)
