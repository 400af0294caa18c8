"""`zero-ps demo`, small."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ps.demo import main
from ps.demo_folder import DemoError, Paths, claimed
from ps.store import DataDir, JobStore, StoreError

SMALL = ["--", "--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "2", "--dtype", "fp32"]
KEYS = {"first_loss", "last_loss", "steps", "bytes_pulled", "bytes_pushed", "peak_rss_bytes", "data_dirs"}


def demo(*flags: str, train: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ps", "demo", *flags, *SMALL, *train],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def processes_with(word: str) -> list[str]:
    """Command lines of running processes that contain `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command:
            found.append(command)
    return found


def test_demo_trains_then_goes_on_then_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = demo("--out", str(out), "--steps", "4")
    assert first.returncode == 0, first.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == KEYS
    assert summary["steps"] == 4
    assert set(summary["peak_rss_bytes"]) == {"server-0", "server-1", "trainer-0", "trainer-1"}
    assert min(summary["peak_rss_bytes"].values()) > 1 << 20
    assert all(Path(folder).is_dir() for folder in summary["data_dirs"])
    assert len(summary["data_dirs"]) == 2
    assert summary["bytes_pulled"] > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for word in ("first loss", "last loss", "bytes pulled", "peak memory, trainer-1", "store of server-1", "loss.png"):
        assert word in first.stdout

    second = demo("--out", str(out), "--steps", "3", "--trainers", "1")
    assert second.returncode == 0, second.stderr
    assert "going on from the commit at step 4, up to step 7" in second.stdout
    again = json.loads((out / "summary.json").read_text())
    assert again["steps"] == 7
    assert again["first_loss"] == summary["first_loss"]
    assert len((out / "loss.jsonl").read_text().splitlines()) == 7

    other = demo("--out", str(out), "--servers", "3")
    assert other.returncode == 2
    assert "was made with --servers 2" in other.stderr

    fresh = demo("--out", str(out), "--steps", "2", "--servers", "1", "--trainers", "1", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], len(summary["data_dirs"])) == (2, 1)
    assert not processes_with(str(out))


def test_a_folder_that_is_not_the_demos_is_never_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["--out", str(tmp_path), "--fresh"]) == 2
    assert "was not made by this demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
    assert main(["--out", str(tmp_path / "thesis.tex")]) == 2
    assert main(["--out", str(tmp_path / "new"), "--trainers", "0"]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["garbage", "[]", "{}", '{"servers": "2"}', '{"servers": 0}', "\xff"])
def test_a_damaged_marker_is_one_line_and_fresh_starts_over(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".zero-ps-demo").write_bytes(text.encode("latin-1"))
    assert main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is damaged; start over with --fresh" in error
    assert error.count("\n") == 1
    with claimed(Paths(tmp_path), fresh=True, servers=3) as servers:
        assert servers == 3
    with claimed(Paths(tmp_path), fresh=False, servers=None) as servers:
        assert servers == 3


def test_a_folder_that_cannot_be_made_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", "/proc/foo"]) == 2
    error = capsys.readouterr().err
    assert error == "zero-ps demo: cannot use /proc/foo: No such file or directory; choose another folder with --out\n"


def test_fresh_deletes_all_but_the_marker_whose_lock_it_holds(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "demo")
    with claimed(paths, fresh=False, servers=1):
        inode = paths.marker.stat().st_ino
    (paths.state / "shard-0").mkdir(parents=True)
    paths.log.write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years of work")
    (paths.out / "link").symlink_to(elsewhere)
    with claimed(paths, fresh=True, servers=None) as servers:
        assert servers == 2
        assert list(paths.out.iterdir()) == [paths.marker]
        # A marker that had been deleted and made again would be another file, with a lock of its own.
        assert paths.marker.stat().st_ino == inode
        with pytest.raises(DemoError, match="a demo is running"), claimed(paths, fresh=True, servers=None):
            pass
    assert (elsewhere / "thesis.tex").exists()


def test_fresh_leaves_a_store_alone_that_a_server_is_using(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = Paths(tmp_path)
    with claimed(paths, fresh=False, servers=1):
        pass
    with DataDir(paths.state / "shard-0", 0, 1):
        assert main(["--out", str(tmp_path), "--fresh"]) == 2
        assert "a server is using" in capsys.readouterr().err
        assert main(["--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "is using it; stop that server" in error
        assert error.count("\n") == 1
    assert (paths.state / "shard-0" / "zero-ps.json").exists()


def test_a_store_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(store: JobStore) -> list[int]:
        raise StoreError("cannot read the generations: Input/output error")

    monkeypatch.setattr(JobStore, "committed", damaged)
    assert main(["--out", str(tmp_path), "--servers", "1"]) == 2
    error = capsys.readouterr().err
    assert error == "zero-ps demo: the servers cannot start: cannot read the generations: Input/output error\n"
    assert not processes_with(str(tmp_path))


def test_flags_after_which_nobody_trains_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = demo("--out", str(out), "--servers", "1", "--trainers", "1", train=("--help",))
    assert result.returncode == 2
    assert result.stderr == "zero-ps demo: the trainers ended without training; look at the flags after --\n"


def test_a_trainer_that_fails_ends_the_demo_with_its_error(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = demo("--out", str(out), train=("--optimizer", "Nonesuch"))
    assert result.returncode == 1
    assert "--optimizer Nonesuch: torch.optim has no such class" in result.stderr
    assert not processes_with(str(out))


def test_a_running_demo_keeps_its_folder_and_ctrl_c_commits_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "ps", "demo", "--out", str(out), "--steps", "100000", *SMALL, "--commit-every", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    log = out / "loss.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)

    for flags in ([], ["--fresh"]):
        second = demo("--out", str(out), *flags)
        assert second.returncode == 2
        assert second.stderr == (
            f"zero-ps demo: a demo is running in {out} already; stop that one, or choose another folder with --out\n"
        )
    assert log.exists(), "--fresh deleted what a running demo writes"

    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "of 100000 is committed" in said
    assert not processes_with(str(out))
    made = len(log.read_text().splitlines())
    later = demo("--out", str(out), "--steps", str(made + 1))
    assert later.returncode == 0, later.stderr
    assert f"going on from the commit at step {made}" in later.stdout
