"""The tokens file: what it may say, and what becomes of a new one."""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch

import trainer
from protos import zero_ps_pb2 as pb
from ps.tokens import Right, Tokens, parse_tokens
from ps.watched import Watched
from tests.models import Residual, batch, loss_of, seeded
from tests.security.tokens import TOKENS
from tests.trainer.runs import adamw
from trainer.links import Pull

GOOD, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_lines_of_one_token_add_up() -> None:
    tokens = parse_tokens(f"{GOOD} train gpt-*  # a remark\n\n# another\n{OTHER} admin *\n{GOOD}\tread\t*\n")
    rules = tokens.find(GOOD)
    assert len(tokens) == 2 and rules is not None
    assert rules.allows(Right.TRAIN, "gpt-1") and rules.allows(Right.READ, "bert")
    assert not rules.allows(Right.TRAIN, "bert") and not rules.allows(Right.ADMIN, "gpt-1")
    assert rules.allows_all(Right.READ) and not rules.allows_all(Right.TRAIN) and rules.allows_some(Right.TRAIN)
    assert tokens.find(GOOD[:-1]) is None and tokens.find("") is None and tokens.find(f"{GOOD}\udcff") is None


@pytest.mark.parametrize(
    ("pattern", "job", "expected"),
    [
        ("a", "a", True),
        ("a", "A", False),
        ("a", "ab", False),
        ("a", "ba", False),
        ("a*", "a", True),
        ("*", "", True),
        ("a?", "ab", True),
        ("a?", "a", False),
        ("[ab]c", "bc", True),
        ("[!ab]c", "bc", False),
        ("a.c", "abc", False),
        ("a", "a\n", False),
        ("[a", "[a", True),
    ],
)
def test_patterns_are_those_of_file_names(pattern: str, job: str, expected: bool) -> None:
    rules = parse_tokens(f"{GOOD} read {pattern}").find(GOOD)
    assert rules is not None and rules.allows(Right.READ, job) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no rule"),
        ("# nothing\n\n", "it has no rule"),
        (f"{GOOD} read *\n{OTHER} read\n", "line 2 has 2 fields"),
        (f"{GOOD} read * *\n", "line 1 has 4 fields"),
        (f"\n\nshort read *\n{GOOD} read *", "line 3: the token has to have 16"),
        (f"{GOOD}:{OTHER} read *", "line 1: the token has to have 16"),
        (f"{GOOD} write *", "line 1: the right is none of read, train, admin"),
        (f"{GOOD} READ *", "line 1: the right is none of"),
        (f"read {GOOD} *", "line 1: the token"),
        (f"{GOOD} read ../*", "line 1: no job has a name that matches"),
        (f"{GOOD} read ä", "line 1: no job has a name that matches"),
    ],
)
def test_a_line_that_is_no_rule_is_named_and_not_shown(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_tokens(text)
    assert message in str(error.value)
    assert GOOD not in str(error.value) and OTHER not in str(error.value)


def test_tokens_are_in_no_representation() -> None:
    tokens = parse_tokens(f"{GOOD} read *")
    assert GOOD not in repr(tokens) + repr(tokens.find(GOOD)) + repr(vars(tokens))


def test_a_file_that_has_changed_is_read_again_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{GOOD} read *\n")
    tokens: Watched[Tokens] = Watched([path], lambda: parse_tokens(path.read_text()))

    def wait(known: str) -> None:
        until(lambda: tokens.value.find(known) is not None)

    replace(path, f"{OTHER} read *\n")
    wait(OTHER)
    assert tokens.value.find(GOOD) is None
    replace(path, "nonsense\n")
    until(lambda: tokens.value is not None and "what was read before stays in force" in caplog.text)
    assert "line 1 has 1 fields" in caplog.text and "nonsense" not in caplog.text
    wait(OTHER)
    path.unlink()
    tokens.reload()
    assert tokens.value.find(OTHER) is not None
    path.write_text(f"{GOOD} read *\n")
    wait(GOOD)


def test_a_server_takes_new_tokens_and_forgets_old_ones(start, tmp_path: Path) -> None:
    """At once after SIGHUP; without a session being interrupted whose token stays."""
    path = tmp_path / "tokens"
    path.write_text(f"{GOOD} train *\n{OTHER} train *\n")
    server = start("--tokens", path)
    stays = trainer.connect(server.address, job="stays", credentials=trainer.Credentials(token=GOOD))
    goes = trainer.connect(server.address, job="goes", credentials=trainer.Credentials(token=OTHER))
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    pulls = goes.servers[0].stream("Pull", iter(requests.get, None))
    request = pb.PullRequest(session_id=goes.servers[0].session_id).SerializeToString()
    requests.put(request)
    assert "has no state" in pb.PullResponse.FromString(next(pulls)).error.message
    (link,) = goes.links
    assert link.kind == "shm"
    pull = Pull(version=0, chunks=[(0, 0)], destinations=[torch.empty(4, dtype=torch.uint8)], dtype=None, timeout=5)
    with pytest.raises(trainer.RequestRefused, match="has no state"):
        link.pull(pull).result(10)
    path.write_text(f"{GOOD} train *\n")
    server.process.send_signal(signal.SIGHUP)
    server.log_with("again")
    # Nor does a stream go on that is there.
    requests.put(request)
    with pytest.raises(grpc.RpcError) as error:
        next(pulls)
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    requests.put(None)
    for refused in (lambda: barrier(goes), lambda: link.pull(pull).result(10)):
        with pytest.raises(trainer.AccessDenied, match="does not know th"):
            refused()
    barrier(stays)
    path.write_text("\n")
    os.kill(server.process.pid, signal.SIGHUP)
    assert "stays in force" in server.log_with("stays in force")
    barrier(stays)
    stays.close()
    goes.close()


def test_a_token_that_is_put_back_within_the_lease_was_never_missed(start, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{GOOD} train *\n")
    server = start("--tokens", path, "--lease", 15)
    with trainer.connect(server.address, credentials=trainer.Credentials(token=GOOD)) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model.parameters())

        def step() -> None:
            loss_of(model, batch(job.step)).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        rewrite(server, path, f"{OTHER} train *\n")
        # A heartbeat was.
        assert "without a valid token" in server.log_with("without a valid token")
        rewrite(server, path, f"{GOOD} train *\n")
        job.check()
        step()


def test_a_token_that_is_exchanged_is_waited_for_and_read_again(start, tmp_path: Path) -> None:
    path, token_file = tmp_path / "tokens", tmp_path / "token"
    path.write_text(f"{GOOD} train *\n")
    token_file.write_text(f"{GOOD}\n")
    server = start("--tokens", path)
    lost: list[str] = []

    def exchange(error: trainer.ZeroPsError) -> None:
        lost.append(f"{type(error).__name__}: {error}")
        # The server forgot the old one first: nobody gets in for a while.
        later = threading.Timer(1.0, token_file.write_text, [f"{OTHER}\n"])
        later.start()

    with trainer.connect(server.address, credentials=trainer.Credentials(token_file=token_file)) as job:
        model = trainer.offload(seeded(Residual), job)
        optimizer = adamw(model.parameters())
        while job.step < 3:
            with job.recovering(on_lost=exchange, timeout=60):
                loss_of(model, batch(job.step)).backward()
                if job.step == 1 and not lost:
                    rewrite(server, path, f"{OTHER} train *\n")
                optimizer.step()
                optimizer.zero_grad()
    (error,) = lost
    assert error.startswith("TokenUnknown") and "joins again with job.recovering() or job.recover()" in error


def test_a_right_that_is_taken_away_is_not_waited_for(start, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{GOOD} train *\n")
    server = start("--tokens", path)
    with trainer.connect(server.address, credentials=trainer.Credentials(token=GOOD)) as job:
        rewrite(server, path, f"{GOOD} read *\n")
        refused = pytest.raises(trainer.AccessDenied, match="takes the right 'train' on a job")
        with refused, job.recovering():
            barrier(job)


def rewrite(server, path: Path, text: str) -> None:
    """Has a server read other tokens."""
    times = server.log.count("again")
    path.write_text(text)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.log.count("again") > times)


def barrier(job: trainer.Job) -> None:
    (server,) = job.servers
    request = pb.BarrierRequest(session_id=server.session_id, tag="x", timeout_seconds=5)
    server.call("Barrier", request, 10)


def replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_these_tests_have_tokens_that_a_file_takes() -> None:
    assert len(parse_tokens("".join(f"{token} {rule}\n" for token, rule in TOKENS.values()))) == len(TOKENS)
