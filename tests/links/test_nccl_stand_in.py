"""What every link does, through the nccl link's classes, with gloo in place of NCCL (`tests.links.stand_in`)."""

from collections.abc import Iterator
from typing import Any

import pytest

from ps import LocalCluster
from tests.links import stand_in
from tests.links.conformance import LinkConformance


@pytest.fixture(scope="module", autouse=True)
def _gloo_in_place_of_nccl() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in.patch(monkeypatch)
        yield


class TestNcclLink(LinkConformance):
    kind = "nccl"
    prelude = "import pytest, tests.links.stand_in\ntests.links.stand_in.patch(pytest.MonkeyPatch())"

    @classmethod
    def start(cls, **options: Any) -> LocalCluster:
        return LocalCluster(1, device="cuda:0", **options)
