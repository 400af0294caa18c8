"""A server of another version of the protocol is refused before anything is asked of it."""

import pytest

import ps.service
import trainer
from protos import PROTOCOL_VERSION
from ps.options import ServerOptions
from ps.server import ServeOptions, Server
from ps.store import DataDir


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1], ids=["older", "newer"])
def test_a_server_of_another_version_is_refused_with_both_named(tmp_path, monkeypatch, version: int) -> None:
    monkeypatch.setattr(ps.service, "PROTOCOL_VERSION", version)
    options = ServeOptions(ServerOptions(0, 1), (tmp_path,), "127.0.0.1:0", threads=1)
    server = Server(options, DataDir([tmp_path], 0, 1))
    server.start()
    try:
        with pytest.raises(trainer.ConnectError) as refused:
            trainer.connect(server.address, connect_timeout=20)
    finally:
        server.stop(1.0)
    message = str(refused.value)
    assert f"protocol version {version}" in message and f"version {PROTOCOL_VERSION}" in message
    assert "install the same zero-ps on both" in message
