"""The container against the library that defines it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from trainer_client.wire.safetensors_file import HostTensor, body_of, read_container

ARRAYS = {
    "wide": np.arange(6, dtype=np.int64).reshape(2, 3),
    "half": np.ones(3, np.float16),
    "bytes": np.arange(5, dtype=np.uint8),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "truth": np.array([True, False]),
}


def test_what_the_library_writes_is_read_in_place() -> None:
    content = bytearray(save(ARRAYS, {"a": "b\u2028"}))
    tensors, metadata = read_container(content)
    assert metadata == {"a": "b\u2028"}
    assert tensors.keys() == ARRAYS.keys()
    whole = np.frombuffer(content, np.uint8)
    for name, array in ARRAYS.items():
        read = tensors[name].array.view(bool) if name == "truth" else tensors[name].array
        np.testing.assert_array_equal(read, array)
        assert read.shape == array.shape
        assert not array.size or np.shares_memory(read, whole), name
        assert read.flags.aligned


def test_what_is_written_is_what_the_library_reads() -> None:
    dtypes = {"int64": "I64", "float16": "F16", "uint8": "U8", "float32": "F32", "bool": "BOOL"}
    tensors = {name: HostTensor(dtypes[array.dtype.name], array) for name, array in ARRAYS.items()}
    read = dict(deserialize(bytes(body_of(tensors, {"a": "b"}))))
    assert {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in read.items()} == {
        name: (array.shape, array.tobytes()) for name, array in ARRAYS.items()
    }


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: object = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends after 0 bytes"),
        (b"\xff" * 20, "ends after 20 bytes"),
        (file(b"{"), "not JSON"),
        (file(b"[]"), "not a JSON object"),
        (file({"__metadata__": {"a": 1}}), "metadata"),
        (file({"x": 3}), "'x'"),
        (file({"x": {"dtype": "U8"}}), "'x'"),
        (file({"x": entry(0, 2, [-2])}, b"ab"), "'x'"),
        (file({"x": entry(0, 2, dtype="F8")}, b"ab"), "dtype F8"),
        (file({"x": entry(0, 4)}, b"ab"), "bytes 0 to 4 of 2"),
        (file({"x": entry(0, 2, [3])}, b"ab"), "bytes 0 to 2"),
        (file({"x": entry(2, 0, [0])}, b"ab"), "bytes 2 to 0"),
        (file({"x": entry(0, 2), "y": entry(1, 3)}, b"abc"), "overlap"),
        (file({"x": entry(0, 1), "y": entry(2, 3)}, b"abc"), "hole"),
        (file({"x": entry(0, 2)}, b"abc"), "has 3 bytes, its tensors 2"),
    ],
)
def test_what_the_library_refuses_is_refused_with_its_cause(content: bytes, message: str) -> None:
    with pytest.raises(SafetensorError):
        deserialize(content)
    with pytest.raises(ValueError, match=message):
        read_container(content)
