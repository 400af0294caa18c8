"""Headers of safetensors files: whatever the bytes are, they are understood as the library does, or refused."""

import json
import math
import struct

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.tools.errors import ToolError
from ps.tools.safetensors_header import NewTensor, decode, encode, header_bytes

WRITTEN = [torch.int64, torch.float32, torch.bfloat16, torch.bool]
DTYPES = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
SIZES = dict(zip(DTYPES, [8, 8, 4, 4, 2, 2, 2, 1, 1, 1], strict=True))


def read(data: bytes):
    """The tensors of a file with this content, as an import reads them."""
    length = header_bytes(data[:8], len(data), "file")
    return decode(data[8 : 8 + length], len(data), "file")


def content(header: object, data_bytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---------------------------------------------------------------- garbage

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
odd_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", "U16", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)


@st.composite
def nearly_right(draw) -> bytes:
    """A right file of which one thing may have been changed."""
    header, position = {}, 0
    for number in range(draw(st.integers(0, 3))):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
        stop = position + math.prod(shape) * SIZES[dtype]
        header[f"t{number}"] = entry(dtype, shape, [position, stop])
        position = stop
    if header and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(header)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header[name][field] = draw(odd_entries)[field]
    return content(header, max(0, position + draw(st.sampled_from([0, 0, 0, -1, 1, 8]))))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=64)
    | st.builds(content, st.binary(max_size=64), st.integers(0, 16))
    | st.builds(
        content, st.dictionaries(st.text(max_size=4), odd_entries | json_values, max_size=3), st.integers(0, 64)
    )
    | nearly_right()
)
def test_any_bytes_are_refused_with_an_error_or_are_what_the_library_reads(data):
    try:
        tensors = read(data)
    except ToolError as error:
        assert str(error).startswith("file ")
        return
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for tensor in tensors:
        assert begin <= tensor.start <= tensor.stop <= len(data)
    assert sum(tensor.stop - tensor.start for tensor in tensors) == len(data) - begin
    if all(tensor.dtype is not None for tensor in tensors) and data[8:9] == b"{" and is_plain(data[8:begin]):
        library = dict(safetensors.deserialize(data))
        assert library.keys() == {tensor.name for tensor in tensors}
        for tensor in tensors:
            found = library[tensor.name]
            assert (found["dtype"], tuple(found["shape"])) == (tensor.dtype_name, tensor.shape)


def is_plain(header: bytes) -> bool:
    """Without what the library is stricter about: keys that it does not know, lone surrogates, metadata."""
    document = json.loads(header)
    return "__metadata__" not in document and all(
        value.keys() == {"dtype", "shape", "data_offsets"} and name.isprintable() for name, value in document.items()
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WRITTEN), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_what_is_written_is_read_again(kinds):
    tensors = [NewTensor(f"é{number}", dtype, tuple(shape)) for number, (dtype, shape) in enumerate(kinds)]
    header, offsets = encode(tensors)
    found = read(header + bytes(sum(tensor.bytes for tensor in tensors)))
    assert {(t.name, t.dtype, t.shape, t.start, t.stop) for t in found} == {
        (t.name, t.dtype, t.shape, offsets[t.name], offsets[t.name] + t.bytes) for t in tensors
    }
    assert len(header) % 8 == 0


# ---------------------------------------------------------------- each way of being wrong

WRONG = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"1234567", "has 7 bytes"),
    "huge header": (struct.pack("<Q", 1 << 62), "that the header has 4611686018427387904 bytes"),
    "cut within the header": (content({"a": entry()}, 8)[:20], "is cut off within its header"),
    "cut within a tensor": (content({"a": entry()}, 7), "is cut off: tensor 'a' ends at byte"),
    "trailing bytes": (content({"a": entry()}, 9), "its tensors end at byte"),
    "not JSON": (content(b"{]", 0), "its header is not JSON"),
    "not UTF-8": (content(b'{"\xff": 1}', 0), "its header is not JSON"),
    "deep": (content(b"[" * 100_000, 0), "its header is not JSON"),
    "a list": (content([], 0), "its header is a list"),
    "twice": (content(b'{"a": {}, "a": {}}', 0), "has 'a' twice"),
    "overlap": (content({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "tensor 'b' overlaps another"),
    "the same bytes": (content({"a": entry(), "b": entry()}, 8), "tensor 'b' overlaps another"),
    "hole": (content({"a": entry(), "b": entry(offsets=(12, 20))}, 20), "tensor 'b' leaves 4 bytes out"),
    "no offsets": (content({"a": {"dtype": "F32", "shape": [2]}}, 8), "'a' is not described by"),
    "number": (content({"a": 3}, 8), "'a' is not described by"),
    "dtype": (content({"a": entry(dtype=3)}, 8), "'a' has dtype 3"),
    "shape": (content({"a": entry(shape="2")}, 8), "'a' has shape '2'"),
    "negative": (content({"a": entry(shape=(-2, -1))}, 8), "'a' has shape [-2, -1]"),
    "flag": (content({"a": entry(shape=(True, 2))}, 8), "'a' has shape [True, 2]"),
    "dimensions": (content({"a": entry(shape=[1] * 65, offsets=(0, 4))}, 4), "'a' has shape"),
    "elements": (content({"a": entry(shape=(1 << 40, 1 << 40))}, 8), "which is too large"),
    "elements of nothing": (content({"a": entry(shape=(1 << 60, 0), offsets=(0, 0))}, 0), "which is too large"),
    "backwards": (content({"a": entry(offsets=(8, 0))}, 8), "'a' has data_offsets [8, 0]"),
    "size": (content({"a": entry(offsets=(0, 12))}, 12), "'a' has 12 bytes, and shape [2] in F32 takes 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_file_is_refused_with_what_is_wrong(name):
    data, message = WRONG[name]
    with pytest.raises(ToolError) as error:
        read(data)
    assert message in str(error.value) and str(error.value).startswith("file ")


def test_a_dtype_that_is_not_stored_is_known_by_name():
    (found,) = read(content({"a": entry(dtype="F8_E4M3", shape=(8,))}, 8))
    assert (found.dtype, found.dtype_name) == (None, "F8_E4M3")


def test_a_header_that_readers_would_refuse_is_not_written(monkeypatch):
    monkeypatch.setattr("ps.tools.safetensors_header.MAX_HEADER_BYTES", 100)
    with pytest.raises(ToolError, match=r"need a header of \d+ bytes.*--max-shard-size"):
        encode([NewTensor("a", torch.float32, (2,)), NewTensor("b", torch.float32, (2,))])
