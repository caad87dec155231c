"""The safetensors container, read and written in place: a header in front, and views of memory that is already there.

It is done here rather than by the safetensors library because that copies every tensor, in both directions, and numpy
has no bfloat16 for it. Adapters on their way out and binary replies on their way in both pass here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from trainer_client.wire.call import Body

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint64": "U64",
        "uint32": "U32",
        "uint16": "U16",
        "uint8": "U8",
        "bool": "BOOL",
    }
)
"""Names of dtypes: on the host → in the file."""
_STORED: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype("uint16" if name == "BF16" else host).newbyteorder("<") for host, name in DTYPES.items()}
)


@dataclass(frozen=True, slots=True, eq=False)
class HostTensor:
    """One tensor in host memory: C-contiguous, little-endian; bfloat16 as its uint16 bits."""

    dtype: str
    """safetensors name: `F32`, `BF16`, …"""
    array: np.ndarray
    was: str | None = None
    """The dtype that it was cast from, since no adapter is served in it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def body_of(tensors: Mapping[str, HostTensor], metadata: Mapping[str, str]) -> Body:
    """One file, sent straight from the tensors' own memory."""
    # Wide dtypes first, then by name, as the library orders them: every tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].array.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.array.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = (tensor.array.reshape(-1).view(np.uint8).data for _, tensor in ordered)
    return Body((len(text).to_bytes(8, "little") + text, *raw))


def read_container(content: bytes | bytearray) -> tuple[dict[str, HostTensor], dict[str, str]]:
    """(tensors as views of `content`, metadata). Raises `ValueError` with what is wrong with the file."""
    view = memoryview(content)
    begin = 8 + int.from_bytes(view[:8], "little")
    if len(view) < 8 or begin > len(view):
        raise ValueError(f"it ends after {len(view)} bytes, within its header")
    try:
        header = json.loads(bytes(view[8:begin]))
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings by name")
    tensors = {name: _tensor(name, entry, view[begin:]) for name, entry in header.items()}
    _check_tiling([entry["data_offsets"] for entry in header.values()], len(view) - begin)
    return tensors, metadata


def _tensor(name: str, entry: Any, data: memoryview) -> HostTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            stored = _STORED.get(dtype)
        case _:
            raise ValueError(f"its header does not say dtype, shape and data_offsets of {name!r}")
    if stored is None:
        raise ValueError(f"tensor {name!r} has dtype {dtype}, which is not read here")
    count = math.prod(shape)
    if not 0 <= start <= end <= len(data) or end - start != count * stored.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} cannot be bytes {start} to {end} of {len(data)}")
    return HostTensor(dtype, np.frombuffer(data[start:end], stored).reshape(shape))


def _check_tiling(places: list[list[int]], size: int) -> None:
    """Every byte belongs to one tensor, so that nothing is read twice and nothing is left over."""
    at = 0
    for start, end in sorted(map(tuple, places)):
        if start != at:
            raise ValueError(f"its tensors overlap or leave a hole at byte {min(start, at)} of its data")
        at = end
    if at != size:
        raise ValueError(f"its data has {size} bytes, its tensors {at}")
