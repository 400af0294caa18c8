"""The shm link does what every link does."""

from tests.links.conformance import LinkConformance


class TestShmLink(LinkConformance):
    kind = "shm"
