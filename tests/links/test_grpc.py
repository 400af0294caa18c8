"""The grpc link does what every link does."""

from tests.links.conformance import LinkConformance


class TestGrpcLink(LinkConformance):
    kind = "grpc"
