"""README.md and docs/architecture.md name what there is."""

import re
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).parents[2]
PAGES = [
    *("README.md", "SECURITY.md"),
    *("docs/architecture.md", "docs/failures.md", "docs/operations.md", "docs/security.md"),
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
    named = [ROOT / path for path in re.findall(r"`((?:ps|trainer|protos)/[\w/.]+)`", text)]
    linked = [(ROOT / page).parent / path for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert linked
    missing = [str(path) for path in [*named, *linked] if not path.exists()]
    assert not missing
