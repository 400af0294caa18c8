"""The frames that are written by hand are those of the `.proto`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import frames
from protos import zero_ps_pb2 as pb


@given(st.integers(1, 2**64 - 1), st.binary(max_size=300))
def test_frames_are_what_protobuf_writes(request_id: int, data: bytes) -> None:
    pulled = frames.pull_head(request_id, len(data)) + data
    assert pb.PullResponse.FromString(pulled) == pb.PullResponse(request_id=request_id, data=data)
    pushed = frames.push_head(len(data)) + data
    assert pushed == pb.PushRequest(data=data).SerializeToString()
    for found in (
        frames.decode_pull(pulled),
        frames.decode_pull(pb.PullResponse.FromString(pulled).SerializeToString()),
    ):
        if isinstance(found, pb.PullResponse):
            assert data == found.data == b""
        else:
            assert (found.request_id, bytes(found.data)) == (request_id, data)
    assert bytes(frames.decode_push(pushed).data) == data


@pytest.mark.parametrize(
    "message",
    [
        pb.PullResponse(),
        pb.PullResponse(request_id=5),
        pb.PullResponse(request_id=5, error=pb.Error(code=3, message="no")),
        pb.PullResponse(request_id=5, data=b"x", error=pb.Error(code=3)),
        pb.PullResponse(request_id=5, regions=[pb.Region(offset=1, size=2)]),
        pb.PullResponse(data=b"abc"),
    ],
)
def test_everything_else_is_left_to_protobuf(message: pb.PullResponse) -> None:
    assert frames.decode_pull(frames.encode(message)) == message


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_protobuf_reads_them(raw: bytes) -> None:
    for decode, kind in ((frames.decode_pull, pb.PullResponse), (frames.decode_push, pb.PushRequest)):
        try:
            expected = kind.FromString(raw)
        except Exception:
            expected = None
        try:
            found = decode(raw)
        except Exception:
            assert expected is None
            continue
        if isinstance(found, frames.Data):
            assert expected is not None and bytes(found.data) == expected.data
        else:
            assert found == expected
