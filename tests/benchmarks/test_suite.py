"""The measurements as programs: each can be started alone, and what it writes can be read again."""

import ast
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import plots, report, step, tables, timeline
from benchmarks.__main__ import MODULES
from benchmarks.report import Row

ROOT = Path(__file__).parents[2]

ROWS = [
    Row("step", 2.0, "s", "plain", 1.0, case={"case": "compute", "trainers": 1, "side": "plain"}),
    Row(
        "step", 2.2, "s", "plain", 1.1, at_most=1.15, case={"case": "compute", "trainers": 1, "side": "zero-ps, memory"}
    ),
    Row("pull", 4.0, "GB/s", "memcpy", 0.5, at_least=0.6, case={"link": "shm"}),
    Row("load of the machine", 0.25, "processes"),
]


@pytest.mark.parametrize("name", MODULES)
def test_every_measurement_is_a_program_with_the_same_flags(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__ and callable(module.run)
    # A parser of its own would not have the flags.
    tree = ast.parse(Path(str(module.__file__)).read_text())
    used = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert used & {"report.main", "report.parser"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_gpu_its_measurement_says_so(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--quick", "--json", str(tmp_path / "gpu.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "no GPU: torch finds no CUDA device here, so nothing was measured\n"


def test_flags_of_a_measurement(tmp_path: Path) -> None:
    arguments = report.parser("about").parse_args(["--quick", "--json", str(tmp_path / "a.json")])
    assert arguments.quick and arguments.json == tmp_path / "a.json"


def test_rows_are_the_same_after_they_were_written_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.json"
    arguments = report.parser(None).parse_args(["--json", str(path)])
    # One bar does not hold.
    assert report.conclude(ROWS, arguments) == 1
    measured = report.read(path)
    assert list(measured.rows) == ROWS
    assert [row.holds for row in measured.rows] == [None, True, False, None]
    assert {"date", "commit", "cores", "torch"} <= measured.machine.keys() and measured.machine["quick"] is False
    fields = {"name", "value", "unit", "against", "ratio", "bar", "holds", "case"}
    assert all(row.keys() == fields for row in json.loads(path.read_text())["rows"])
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["step"], ["profile", "--symbols"], ["step", "--blocks"], ["profile", "--steps"]])
def test_flags_that_cannot_be_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    name, *flag = flags
    (tmp_path / "file").touch()
    module = importlib.import_module(f"benchmarks.{name}")
    wrong = [[*flag, "0"]] if flag else [["--json", str(tmp_path)], ["--json", str(tmp_path / "file" / "a.json")]]
    for arguments in wrong:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as exit:
            module.main()
        assert exit.value.code == 2
        said = capsys.readouterr().err
        assert "is no whole number from 1" in said or "is a folder" in said or "cannot be made" in said


def test_quick_measures_what_the_other_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[step.Plan] = []
    monkeypatch.setattr(step, "measure", lambda plan, say: plans.append(plan) or [])
    for flags in ("--quick", "--quick --against plain,plain --case compute --trainers 2 --steps 7", ""):
        monkeypatch.setattr(sys, "argv", ["step", *flags.split()])
        assert step.main() == 0
    assert plans[0] == step.QUICK and plans[2] == step.Plan()
    assert plans[1] == replace(step.QUICK, against=("plain",), cases=["compute"], trainers=[2], steps=7)


@pytest.mark.parametrize("module", [tables, plots])
def test_a_folder_without_measurements_is_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    monkeypatch.setattr(sys, "argv", ["read", str(tmp_path)])
    for content, said in ((None, "has no .json file"), ("{}", "step.json is not what a measurement wrote")):
        if content is not None:
            (tmp_path / "step.json").write_text(content)
        with pytest.raises(SystemExit) as exit:
            module.main()
        assert exit.value.code == 2 and said in capsys.readouterr().err


def test_what_is_no_timeline_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "timeline.json"
    for content in (None, "[]", "{}", "x"):
        if content is not None:
            path.write_text(content)
        monkeypatch.setattr(sys, "argv", ["timeline", str(path), str(tmp_path / "out.png")])
        with pytest.raises(SystemExit) as exit:
            timeline.main()
        assert exit.value.code == 2 and "is no timeline of trainer.record_timeline" in capsys.readouterr().err


def test_tables_take_their_places_in_a_page_and_leave_the_rest(tmp_path: Path) -> None:
    written = {"machine": report.machine(), "rows": [row.as_json() for row in ROWS]}
    (tmp_path / "step.json").write_text(json.dumps(written))
    end = "<!-- end of results -->\n"
    page = f"a\n<!-- results: step -->\nreplaced\n{end}b\n<!-- results: scale -->\nkept\n{end}"
    found = tables.put(page, tables.rendered(tmp_path))
    assert "replaced" not in found and "kept" in found and found.startswith("a\n<!-- results: step -->\n`python -m")
    assert "| zero-ps, memory | 2.20 s = 1.10 (1.10 of plain's, bar 1.15: holds) |" in found
    written["machine"]["quick"] = True
    (tmp_path / "step.json").write_text(json.dumps(written))
    assert "`python -m benchmarks.step --quick`, " in tables.rendered(tmp_path)["step"]
    # Once more changes nothing.
    (tmp_path / "step.json").write_text(json.dumps({**written, "machine": report.machine()}))
    assert tables.put(found, tables.rendered(tmp_path)) == found
    (tmp_path / "step.png").touch()
    assert "![step](images/step.png)" in tables.with_pictures(tables.rendered(tmp_path), tmp_path)["step"]
    with pytest.raises(KeyError, match="no table is called 'none'"):
        tables.put(page.replace("results: scale", "results: none"), {})


def test_the_pages_have_places_for_tables_that_exist() -> None:
    for page in ("README.md", "docs/performance.md", "docs/planning.md"):
        text = (ROOT / page).read_text()
        assert "<!-- results: " in text
        assert tables.put(text, {}) == text


def test_a_quick_measurement_from_its_command_line(tmp_path: Path) -> None:
    path = tmp_path / "hooks.json"
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.hooks", "--quick", "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert finished.returncode in (0, 1), finished.stderr
    rows = report.read(path).rows
    assert rows and all(row.value > 0 for row in rows if row.name == "module call")
    assert "module call" in finished.stdout
