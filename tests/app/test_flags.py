"""The training application's command line, as far as it needs no servers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trainer.app
from trainer.__main__ import main
from trainer.app.flags import parse
from trainer.app.loop import learning_rate

SERVERS = ["--servers", "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--servers"),
        ([*SERVERS, "--steps", "0"], "--steps: has to be at least 1, not 0"),
        ([*SERVERS, "--batch", "many"], "--batch: 'many' is not a whole number"),
        ([*SERVERS, "--lr", "-1"], "--lr: has to be a number above 0"),
        ([*SERVERS, "--lr", "much"], "--lr: has to be a number above 0, not much"),
        ([*SERVERS, "--lr", "nan"], "--lr: has to be a number above 0"),
        ([*SERVERS, "--heads", "7"], "512 is not one of 7"),
        ([*SERVERS, "--data", "nowhere/at/all"], "nowhere/at/all: there is no such file or folder"),
        ([*SERVERS, "--dtype", "int8"], "--dtype"),
        ([*SERVERS, "--max-staleness", "-1"], "--max-staleness: has to be at least 0, not -1"),
    ],
)
def test_a_bad_flag_exits_with_2_and_says_which(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, "a line that says what is wrong, and no usage before it"
    assert error.startswith("zero-ps train: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*SERVERS, "--connect-timeout", "0.5"], "127.0.0.1:1"),
        ([*SERVERS, "--optimizer", "Adamw"], "torch.optim has no such class"),
        ([*SERVERS, "--optimizer", "lr_scheduler"], "torch.optim has no such class"),
        ([*SERVERS, "--device", "abacus"], "--device abacus"),
        ([*SERVERS, "--job", "a/b"], "job name 'a/b' is not valid"),
        ([*SERVERS, "--mode", "group"], "--mode group is for trainers that torchrun starts: "),
        ([*SERVERS, "--links", "shm,tcp"], "'tcp' is no kind of link; name one or more of shm, nccl, gloo, grpc"),
    ],
)
def test_what_cannot_begin_exits_with_2_and_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_little_data_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    assert main([*SERVERS, "--data", str(tmp_path)]) == 2
    assert "the data has 4 bytes" in capsys.readouterr().err


def test_help_of_the_module() -> None:
    result = subprocess.run([sys.executable, "-m", "trainer", "--help"], capture_output=True, text=True, check=True)
    assert "--servers" in result.stdout
    assert "(default: AdamW)" in result.stdout
    for nothing in ("None", "[]", "False"):
        assert f"default: {nothing}" not in result.stdout


def test_learning_rate_rises_to_the_peak_and_falls_to_a_tenth() -> None:
    settings = parse([*SERVERS, "--steps", "100", "--warmup", "10", "--lr", "1"])
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_the_application_uses_nothing_below_the_public_api() -> None:
    """It is the example to copy, so it may import `trainer` and itself, and no module below."""
    folder = Path(trainer.app.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                below = name.startswith("trainer.") and not name.startswith("trainer.app")
                assert not below, f"{path.name} imports {name}"
                # How a size is written is the same in every command.
                below = name.split(".")[0] in ("ps", "protos") and name != "protos.sizes"
                assert not below, f"{path.name} imports {name}"
