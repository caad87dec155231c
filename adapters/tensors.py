"""Safetensors bytes in and out, with bf16 kept as its bits. Nothing here knows what the tensors mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open

from adapters.errors import AdapterUnreadable, shown
from adapters.numerics import Scratch

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

    def float32(self, scratch: Scratch | None = None) -> NDArray[np.float32]:
        """The same values, exactly; the array itself where it has this dtype, and otherwise one of `scratch`."""
        if self.dtype == "F32":
            return self.array
        wide = (scratch or Scratch()).array("float32", self.array.shape, np.float32)
        if self.dtype == "BF16":
            bits = wide.view(np.uint32)
            np.copyto(bits, self.array)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(wide, self.array)
        return wide

    def finite(self) -> bool:
        if self.dtype == "BF16":
            exponent = np.uint16(0x7F80)
            return not bool(((self.array & exponent) == exponent).any())
        if self.dtype == "F32":
            values = self.array.reshape(-1)
            # One pass without a temporary array. A sum of finite squares may be infinite, never the other way round.
            with np.errstate(over="ignore", invalid="ignore"):
                squared = float(np.dot(values, values))
            if math.isfinite(squared):
                return True
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
        return AdapterTensor(self.dtype, frozen(self._values.reshape(self.shape)))

    def finite(self) -> bool:
        """The same as that of what `read` gives."""
        return AdapterTensor(self.dtype, self._values).finite()

    @property
    def _values(self) -> NDArray[Any]:
        return np.frombuffer(self.data, STORAGE[self.dtype])


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, marked read-only."""
    array.flags.writeable = False
    return array


def read_safetensors(weights: bytes | memoryview) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """(tensors by the file's names, as views of `weights`; metadata). Raises `AdapterUnreadable` for anything that is
    not a whole file."""
    content = memoryview(weights)
    try:
        return _entries(content)
    except SafetensorError as error:
        # Only here: the length of a header can begin like a pickle.
        if bytes(content[:4]).startswith(PICKLES):
            raise AdapterUnreadable(
                "The weights are a pickle or a zip archive, which is never opened here: save them as safetensors.",
                field="weights",
            ) from error
        raise _broken(len(content), error) from error


def _entries(content: memoryview) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """What the library finds, after its own checks. It copies all data of a file that it is given as bytes, and data is
    no part of what it checks: where the system has files in memory, it is shown one of the same length that has the
    same header and a hole for its data. What it refuses there, or cannot open, it is given as bytes."""
    begin = 8 + int.from_bytes(content[:8], "little")
    if hasattr(os, "memfd_create") and 8 < begin <= len(content):
        header, data = _in_memory(content[:begin], len(content)), content[begin:]
        with suppress(OSError, SafetensorError), header as path, safe_open(path, "numpy") as file:
            places = json.loads(bytes(content[8:begin]))
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: FileTensor(name, entry.get_dtype(), tuple(entry.get_shape()), data[_place(places[name])])
                for name, entry in found.items()
            }, file.metadata() or {}
    entries = deserialize(bytes(content))
    tensors = {name: FileTensor(name, entry["dtype"], tuple(entry["shape"]), entry["data"]) for name, entry in entries}
    # The library does not hand the metadata over.
    return tensors, json.loads(bytes(content[8:begin])).get("__metadata__") or {}


@contextmanager
def _in_memory(begin: memoryview, length: int) -> Iterator[str]:
    """The path of a file that begins so, and has zeros up to `length`, of which none takes memory."""
    file = os.memfd_create("header")
    try:
        os.write(file, begin)
        os.truncate(file, length)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def _place(entry: Any) -> slice:
    """Where a tensor's data lies behind the header. The library takes an entry's three values as a list as well."""
    return slice(*(entry["data_offsets"] if isinstance(entry, dict) else entry[2]))


def _broken(length: int, error: SafetensorError) -> AdapterUnreadable:
    """The sentence for a file that the library refuses: cut off, or wrong in itself."""
    said = str(error).removeprefix("Error while deserializing: ")
    if length >= 8 and "incomplete" not in said and "header length" not in said:
        return AdapterUnreadable(
            f"The weights are not a safetensors file: {shown(said)}. Save them with safetensors again.", field="weights"
        )
    return AdapterUnreadable(
        f"The weights ({length} bytes) are not a complete safetensors file: {shown(said)}. Send the file again, whole.",
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
