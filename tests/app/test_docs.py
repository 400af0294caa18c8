"""README.md and docs/architecture.md name what there is."""

import re
from pathlib import Path

import pytest

import trainer
from benchmarks.__main__ import MODULES

ROOT = Path(__file__).parents[2]
PAGES = [
    *("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]

OWN = ("check", "check_open", "settle_commit", "adopt", "servers", "outbox", "device")
"""What other parts of the package use of a job."""


def test_the_api_table_of_the_readme_has_every_public_name() -> None:
    table = (ROOT / "README.md").read_text().split("## The API")[1].split("##")[0]
    for name in trainer.__all__:
        thing = getattr(trainer, name)
        if not (isinstance(thing, type) and issubclass(thing, trainer.ZeroPsError)):
            assert re.search(rf"`{name}[(.`]", table), f"{name} is not in the table"
    for name in vars(trainer.Job):
        if not name.startswith("_") and name not in OWN:
            assert f"`Job.{name}" in table, f"Job.{name} is not in the table"


def test_the_table_of_errors_has_every_error() -> None:
    table = (ROOT / "docs/architecture.md").read_text().split("## Errors and deadlines")[1]
    for name in trainer.__all__:
        thing = getattr(trainer, name)
        if isinstance(thing, type) and issubclass(thing, trainer.ZeroPsError):
            assert f"{name}`" in table, f"{name} is not in the table"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = [ROOT / path for path in re.findall(r"`((?:ps|trainer|protos|tests|benchmarks)/[\w/.]+)`", text)]
    linked = [(ROOT / page).parent / path for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert linked
    missing = [str(path) for path in [*named, *linked] if not path.exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_headings_that_a_page_links_to_exist(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", (ROOT / page).read_text())
    pages = [(ROOT / page).parent / to if to else ROOT / page for to, _ in links]
    missing = [heading for to, (_, heading) in zip(pages, links, strict=True) if heading not in _headings(to)]
    assert not missing


def _headings(page: Path) -> set[str]:
    """As GitHub writes them in addresses."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in found}


def test_the_page_of_measurements_has_every_module() -> None:
    table = (ROOT / "docs/performance.md").read_text().split("| module | what |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for names in rows for name in names) == sorted([*MODULES, "gpu"])


def test_flags_that_pages_name_exist() -> None:
    sources = "".join(
        path.read_text() for folder in ("ps", "trainer", "protos", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)
    )  # fmt: skip
    for page in PAGES:
        commands = re.findall(r"(?:zero-ps|benchmarks\.\w+)[^`\n]*", (ROOT / page).read_text())
        for flag in {flag for command in commands for flag in re.findall(r"(--[a-z][a-z-]+)", command)}:
            assert f'"{flag}"' in sources, f"{page} names {flag}, which is no flag"
