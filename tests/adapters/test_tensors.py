"""Files read as the library reads them, without its copies; values widened and looked at without more of them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from adapters.errors import AdapterUnreadable
from adapters.numerics import Scratch
from adapters.tensors import AdapterTensor, read_safetensors

Entries = dict[str, tuple[str, tuple[int, ...], bytes]]
F32 = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]'


def by_the_library(content: bytes) -> Entries | None:
    """None where the library refuses the file."""
    try:
        return {name: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for name, e in deserialize(content)}
    except SafetensorError:
        return None


def by_us(content: bytes | memoryview) -> Entries | None:
    try:
        tensors, _ = read_safetensors(content)
    except AdapterUnreadable:
        return None
    return {name: (tensor.dtype, tensor.shape, bytes(tensor.data)) for name, tensor in tensors.items()}


def file_of(header: bytes, data: bytes = bytes(4)) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(8),
        bytes(9),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        file_of(b"{}", b""),
        file_of(b"{}"),
        file_of(b'{"a":{%s}}' % F32),
        file_of(b' {"a":{%s}} ' % F32),
        file_of(b'{"a":{%s}}' % F32, bytes(5)),
        file_of(b'{"a":{%s,"more":3}}' % F32),
        file_of(b'{"a":{%s,"more":%s}}' % (F32, b"1" * 5000)),
        file_of(b'{"a":{%s,"more":%s}}' % (F32, b"[" * 100 + b"]" * 100)),
        file_of(b'{"a":{%s,"more":%s}}' % (F32, b"[" * 5000 + b"]" * 5000)),
        file_of(b'{"a":{%s,"shape":[1]}}' % F32),
        file_of(b'{"a":["F32",[1],[0,4]]}'),
        file_of(b'{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}'),
        file_of(b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'),
        file_of(b'{"a":{%s},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}' % F32),
        file_of(b'{"a":{%s},"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}' % F32),
        file_of(b'{"__metadata__":null,"a":{%s}}' % F32),
        file_of(b'{"__metadata__":{"a":"b","a":"c"},"a":{%s}}' % F32),
        file_of(b'{"__metadata__":{"a":1},"a":{%s}}' % F32),
        file_of(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""),
        file_of(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'),
        file_of(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}'),
        file_of(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
        file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        file_of(b'{"\\ud800":{%s}}' % F32),
        file_of(b'{"a\xff":{%s}}' % F32),
        file_of(b'{"a\\u0000":{%s}}' % F32),
        file_of(b'{"a":{%s}}' % F32 + bytes(3)),
    ],
)
def test_a_file_is_read_and_refused_as_the_library_does(content: bytes) -> None:
    assert by_us(content) == by_the_library(content)


def test_mangled_headers_are_read_and_refused_as_the_library_does() -> None:
    content = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}, metadata={"k": "v"})
    header = 8 + int.from_bytes(content[:8], "little")
    random, accepted = np.random.default_rng(0), 0
    for _ in range(2000):
        mangled = bytearray(content)
        where = int(random.integers(0, header))
        mangled[where] = b'0123456789[]{},":FB'[random.integers(0, 19)] if random.random() < 0.7 else mangled[where - 1]
        expected = by_the_library(bytes(mangled))
        accepted += expected is not None
        assert by_us(bytes(mangled)) == expected, bytes(mangled)
    assert 20 < accepted < 1900


def test_metadata_is_what_the_header_says() -> None:
    content = save({"a": np.zeros(1, np.float32)}, metadata={"format": "pt", "ü": "☃"})
    assert read_safetensors(content)[1] == {"format": "pt", "ü": "☃"}
    assert read_safetensors(save({"a": np.zeros(1, np.float32)}))[1] == {}


def test_no_data_is_copied() -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no files in memory: the library copies what it reads")
    content = memoryview(save({"a": np.zeros(1 << 20, np.float32)}))
    tracemalloc.start()
    try:
        tensors, _ = read_safetensors(content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    kept = tensors["a"].read().array
    assert np.shares_memory(kept, np.frombuffer(content, np.uint8)) and not kept.flags.writeable


NO_FILE_LEFT = """
import os, resource, sys
import numpy as np
from safetensors.numpy import save
from adapters.tensors import read_safetensors
content = save({"a": np.arange(6, dtype=np.float32)}, metadata={"k": "v"})
read_safetensors(content)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    os.open(os.devnull, os.O_RDONLY)
except OSError:
    tensors, metadata = read_safetensors(content)
    print(tensors["a"].read().array.tolist(), metadata)
"""


def test_where_no_file_can_be_opened_the_library_reads_the_bytes() -> None:
    ran = subprocess.run([sys.executable, "-c", NO_FILE_LEFT], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0] {'k': 'v'}\n"


@pytest.mark.parametrize("at", [0, 17, 4095])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1e-30, 1.0, 3e38])
def test_one_value_that_is_not_finite_is_found_among_any(at: int, wrong: float, size: float) -> None:
    """Also where the sum of the squares is infinite, or zero."""
    values = np.full((64, 64), size, np.float32)
    assert AdapterTensor("F32", values).finite()
    values.reshape(-1)[at] = wrong
    assert not AdapterTensor("F32", values).finite()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_are_the_same_in_memory_that_is_used_again(dtype: str) -> None:
    scratch, random = Scratch(), np.random.default_rng(0)
    for shape in ((7, 5), (3, 2), (2, 3, 11)):
        bits = random.integers(0, 0x7C00, shape).astype(np.uint16)
        array = {"F32": bits.astype(np.float32), "F16": bits.view(np.float16), "BF16": bits}[dtype]
        expected = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)
        tensor = AdapterTensor(dtype, array)
        for found in (tensor.float32(scratch), tensor.float32()):
            assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_a_header_of_tensors_in_any_order_has_their_places() -> None:
    header = {
        "later": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "first": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    content = file_of(json.dumps(header).encode(), struct.pack("<ff", 1.0, 2.0))
    found = {name: float(tensor.read().array[0]) for name, tensor in read_safetensors(content)[0].items()}
    assert found == {"first": 1.0, "later": 2.0}
