"""What processes run, by samples that Linux's `perf` takes of all their threads, in native code and in the kernel."""

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SAMPLES_PER_SECOND = 299
"""Not a divisor of what happens in regular intervals."""

_START_SECONDS = 10.0
_END_SECONDS = 60.0

KINDS: tuple[tuple[str, str], ...] = (
    ("optimizer", r"adam|sgd_kernel|adagrad"),
    (
        "copying",
        r"copy_kernel|memmove|memcpy|copy_user|rep_movs|copy_(to|from)_(iter|user)|copy_page|memset|fill_kernel",
    ),
    ("compute", r"\[unknown\] \((perf-\d+\.map|//anon|\[anon)|dnnl|mkl_|gemm|flash_attention|libmkl|xsmm"),
    ("waiting actively", r"libgomp|libiomp"),
    ("checksums", r"crc32c"),
    ("disk", r"ext4|xfs_|btrfs|iomap|blk_|bio_|virtblk|nvme|dio_|submit_bio|aio|io_uring|jbd2"),
    ("network", r"tcp_|skb|sock_|inet_|ip_(rcv|queue|output|local)|loopback|net_rx|__netif|unix_stream|gloo"),
    (
        "memory",
        r"page_fault|clear_page|folio|shmem|_fault|memcg|unmap|pte|vma|mmap|lruvec|lru_|alloc_pages|rmqueue|tlb",
    ),
    ("serialising", r"cygrpc|_message\.|upb_|protobuf|google::"),
    ("malloc", r"malloc|_int_free|cfree|unlink_chunk|posix_memalign"),
    ("switching", r"\[kernel|\[vdso"),
    ("Python", r"libpython|\(python|_bootstrap|torch_python|pybind11|c10::impl::OperatorEntry"),
    ("compute", r"libtorch|libc10"),
)
"""What a sample is of: the first whose expression finds something in `symbol (file)`."""

OTHER = "other"

_LINE = re.compile(r"^\s*(?P<pid>-?\d+)/\d+\s+[0-9a-f]+ (?P<what>.*)$")
_FILE = re.compile(r"\((?:/[^()]*/)?([^()/]*(?:\([^()]*\))?)\)$")


@dataclass
class Samples:
    """By process: how often each symbol was found running."""

    found: dict[int, Counter[str]] = field(default_factory=dict)

    def shares(self, pid: int) -> Mapping[str, float]:
        """Of a process's samples, by kind, the largest share first; empty where there are none."""
        counted: Counter[str] = Counter()
        for symbol, count in self.found.get(pid, Counter()).items():
            counted[kind_of(symbol)] += count
        return {kind: count / counted.total() for kind, count in counted.most_common()}

    def symbols(self, pid: int, most: int) -> Sequence[tuple[str, float]]:
        """What a process is found at most often, and at which share of its samples."""
        counted = self.found.get(pid, Counter())
        return [(symbol, count / counted.total()) for symbol, count in counted.most_common(most)]


def kind_of(symbol: str) -> str:
    """Of `symbol (file)`."""
    return next((kind for kind, expression in KINDS if re.search(expression, symbol)), OTHER)


def available() -> bool:
    """Whether there is `perf`."""
    return shutil.which("perf") is not None


@contextmanager
def sampled(pids: Sequence[int]) -> Iterator[Samples]:
    """Looks at processes; what is yielded has the samples when the context is left. Without `perf` it has none.

    Raises RuntimeError, with what it said, where `perf` may not look.
    """
    samples = Samples()
    if not available():
        yield samples
        return
    with tempfile.TemporaryDirectory(prefix="zero-ps-perf-") as folder:
        data = Path(folder) / "data"
        flags = ["-q", "-e", "cpu-clock", "-F", str(SAMPLES_PER_SECOND), "-o", str(data)]
        recording = subprocess.Popen(
            ["perf", "record", *flags, "-p", ",".join(map(str, pids))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _wait_until_it_looks(recording, data)
            yield samples
        finally:
            recording.send_signal(signal.SIGINT)
            _, said = recording.communicate(timeout=_END_SECONDS)
        if not data.exists():
            raise RuntimeError(f"perf record took no samples: {said.decode(errors='replace').strip()}")
        script = ["perf", "script", "-i", str(data), "-F", "pid,tid,ip,sym,dso"]
        lines = subprocess.run(script, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        samples.found = counted(lines)


def _wait_until_it_looks(recording: "subprocess.Popen[bytes]", data: Path) -> None:
    """It writes the head of its file when it is about to; a short block would be over before."""
    end = time.monotonic() + _START_SECONDS
    while recording.poll() is None and time.monotonic() < end and not (data.exists() and data.stat().st_size):
        time.sleep(0.01)


def counted(lines: str) -> dict[int, Counter[str]]:
    """The lines of `perf script` as counts of `symbol (file)`, by process."""
    found: dict[int, Counter[str]] = {}
    for line in lines.splitlines():
        if match := _LINE.match(line):
            # The file by its name alone.
            what = _FILE.sub(r"(\1)", match["what"])
            found.setdefault(int(match["pid"]), Counter())[what] += 1
    return found
