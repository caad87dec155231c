"""What the text of a kernel needs to be compiled for CUDA and for Metal: macros, indices, and numbers out of 16 bytes.

A body says `$thread`, `$block_x` and so on where it needs an index, and the macros where the two languages differ:
`SHARED` where a variable is declared, `IN_SHARED` where a function is given it. Metal's address spaces (`thread`,
`device`, `constant`, `threadgroup`) are keywords, and so no names of variables."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

Device = Literal["cuda", "metal"]
Launch = Callable[..., Sequence[mx.array]]
"""What `mx.fast.cuda_kernel` and `mx.fast.metal_kernel` return."""
Compiler = Callable[[Device, str, Sequence[str], Sequence[str], str, str], Launch]
"""Makes a kernel of what `compile_kernel` is given."""
CONSTANT = 8
"""MLX passes arrays of fewer elements in Metal's constant address space."""

CUDA = """
#define FN __device__ __forceinline__
#define DEVICE
#define LOCAL
#define SHARED __shared__
#define IN_SHARED
#define BARRIER() __syncthreads()
#define SHUFFLE(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define BITS_TO_FLOAT(bits) __uint_as_float(bits)
#define HALF_TO_FLOAT(bits) __half2float(__ushort_as_half((unsigned short)(bits)))
#define EXP2(x) exp2f(x)
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
"""

METAL = """
#define FN inline
#define DEVICE device
#define LOCAL thread
#define SHARED threadgroup
#define IN_SHARED threadgroup
#define BARRIER() metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define SHUFFLE(value, mask) simd_shuffle_xor(value, ushort(mask))
#define BITS_TO_FLOAT(bits) as_type<float>(bits)
#define HALF_TO_FLOAT(bits) float(as_type<half>(ushort(bits)))
#define EXP2(x) metal::exp2(x)
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
"""

INDICES = {
    "cuda": {
        "thread": "int(threadIdx.x)",
        "block_x": "int(blockIdx.x)",
        "block_y": "int(blockIdx.y)",
        "block_z": "int(blockIdx.z)",
        "blocks_z": "int(gridDim.z)",
    },
    "metal": {
        "thread": "int(thread_position_in_threadgroup.x)",
        "block_x": "int(threadgroup_position_in_grid.x)",
        "block_y": "int(threadgroup_position_in_grid.y)",
        "block_z": "int(threadgroup_position_in_grid.z)",
        "blocks_z": "int(threadgroups_per_grid.z)",
    },
}

NUMBERS = {
    "bfloat16": """
FN void numbers_of(uint4 w, LOCAL float* x) {
  const unsigned int words[4] = {w.x, w.y, w.z, w.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = BITS_TO_FLOAT(words[i] << 16);
    x[2 * i + 1] = BITS_TO_FLOAT(words[i] & 0xffff0000u);
  }
}
""",
    "float16": """
FN void numbers_of(uint4 w, LOCAL float* x) {
  const unsigned int words[4] = {w.x, w.y, w.z, w.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = HALF_TO_FLOAT(words[i] & 0xffffu);
    x[2 * i + 1] = HALF_TO_FLOAT(words[i] >> 16);
  }
}
""",
    "float32": """
FN void numbers_of(uint4 w, LOCAL float* x) {
  x[0] = BITS_TO_FLOAT(w.x);
  x[1] = BITS_TO_FLOAT(w.y);
  x[2] = BITS_TO_FLOAT(w.z);
  x[3] = BITS_TO_FLOAT(w.w);
}
""",
}


def compile_kernel(
    device: Device, name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
) -> Launch:
    """Compiled when it is first called. MLX keeps binaries by name, on disk too, so that the name holds the text."""
    make: Any = mx.fast.cuda_kernel if device == "cuda" else mx.fast.metal_kernel
    text = hashlib.sha256((header + source).encode()).hexdigest()[:12]

    def named(kind: str) -> Launch:
        kernel: Launch = make(
            name=f"{name}_{text}{kind}", input_names=[*inputs], output_names=[*outputs], source=source, header=header
        )
        return kernel

    return named("") if device == "cuda" else ByAddressSpace(named)


@dataclass(frozen=True, slots=True)
class ByAddressSpace:
    """A kernel for Metal under a name for each set of its inputs that are in the constant space: under one name, MLX
    would compile it anew whenever that changes, as it does between few rows and many."""

    named: Callable[[str], Launch]
    made: dict[str, Launch] = field(default_factory=dict)

    def __call__(self, *, inputs: Sequence[mx.array], **call: Any) -> Sequence[mx.array]:
        kind = "".join(f"_{at}" for at, array in enumerate(inputs) if array.size < CONSTANT)
        if kind not in self.made:
            self.made[kind] = self.named(kind)
        return self.made[kind](inputs=inputs, **call)


def own_device() -> Device | None:
    """That of the default device; None on a CPU, for which no kernel is compiled."""
    if mx.default_device() == mx.cpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def constants(**values: int | float) -> str:
    """The declarations that stand in front of a body."""
    lines = []
    for name, value in values.items():
        kind, suffix = ("float", "f") if isinstance(value, float) else ("int", "")
        lines.append(f"  constexpr {kind} {name} = {value!r}{suffix};")
    return "\n".join([*lines, ""])


def macros(device: Device) -> str:
    return {"cuda": CUDA, "metal": METAL}[device]
