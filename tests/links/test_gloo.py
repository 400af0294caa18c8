"""The gloo link does what every link does."""

from tests.links.conformance import LinkConformance


class TestGlooLink(LinkConformance):
    kind = "gloo"
