"""Safetensors bytes in and out, with bf16 kept as its bits. Nothing here knows what the tensors mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from adapters.errors import AdapterUnreadable, shown

STORAGE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Served dtypes → how numpy holds them; bf16 as its upper 16 bits."""
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """`dtype` is the safetensors name. `array` is read-only, C-contiguous and little-endian; BF16 as uint16 bits."""

    dtype: str
    array: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def float32(self) -> NDArray[np.float32]:
        """The same values, exactly; the array itself where it has this dtype."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32, copy=False)

    def finite(self) -> bool:
        if self.dtype == "BF16":
            exponent = np.uint16(0x7F80)
            return not bool(((self.array & exponent) == exponent).any())
        return bool(np.isfinite(self.array).all())

    def transposed(self) -> AdapterTensor:
        """A matrix the other way round; a vector as it is."""
        return AdapterTensor(self.dtype, frozen(np.ascontiguousarray(self.array.T)))


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor as a file holds it, of any dtype and shape. `name` is the file's own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def readable(self) -> bool:
        return self.dtype in STORAGE

    def read(self) -> AdapterTensor:
        """The values, without a copy. Only where `readable`."""
        return AdapterTensor(self.dtype, frozen(np.frombuffer(self.data, STORAGE[self.dtype]).reshape(self.shape)))


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, marked read-only."""
    array.flags.writeable = False
    return array


def read_safetensors(weights: bytes | memoryview) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """(tensors by the file's names, metadata). Raises `AdapterUnreadable` for anything that is not a whole file."""
    content = bytes(weights)  # No copy where it is `bytes` already.
    try:
        entries = deserialize(content)
    except SafetensorError as error:
        # Only here: the length of a header can begin like a pickle.
        if content.startswith(PICKLES):
            raise AdapterUnreadable(
                "The weights are a pickle or a zip archive, which is never opened here: save them as safetensors.",
                field="weights",
            ) from error
        raise _broken(content, error) from error
    tensors = {name: FileTensor(name, entry["dtype"], tuple(entry["shape"]), entry["data"]) for name, entry in entries}
    # The library has checked length and JSON of the header, but does not hand the metadata over.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _broken(content: bytes, error: SafetensorError) -> AdapterUnreadable:
    """The sentence for a file that the library refuses: cut off, or wrong in itself."""
    said = str(error).removeprefix("Error while deserializing: ")
    if len(content) >= 8 and "incomplete" not in said and "header length" not in said:
        return AdapterUnreadable(
            f"The weights are not a safetensors file: {shown(said)}. Save them with safetensors again.", field="weights"
        )
    return AdapterUnreadable(
        f"The weights ({len(content)} bytes) are not a complete safetensors file: {shown(said)}. "
        "Send the file again, whole.",
        field="weights",
    )


def write_safetensors(tensors: Mapping[str, AdapterTensor], metadata: Mapping[str, str]) -> bytes:
    """One file, tensors by sorted name, data aligned to 8 bytes. The same input gives the same bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = (tensor.array.tobytes() for _, tensor in sorted(tensors.items()))
    return b"".join([len(text).to_bytes(8, "little"), text, *data])
