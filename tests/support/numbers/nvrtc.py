"""NVIDIA's own compiler, which needs no GPU: kernels' texts for CUDA as MLX would give them to it. It finds what the
processor's compiler lets pass, and says what a kernel takes of a GPU. Installed by `make test-nvrtc`."""

from __future__ import annotations

import ctypes
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from adapters.kernels.text import Compiler, Device, Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
"""A100, H100 and H200, RTX of 2025."""
NAMES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
}
MOST_DIMENSIONS = 10

AROUND = """
#include <cooperative_groups.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using Shape = cuda::std::array<int32_t, {dimensions}>;
{header}
__global__ void whole({parameters}) {{
{template}
{source}
}}
"""
"""As MLX writes it around a body (mlx/backend/cuda/custom_kernel.cpp)."""


def toolkit() -> Path | None:
    """The folder with NVIDIA's compiler and headers; None where they are not installed."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/lib/libnvrtc.so.*"))
    return found[-1].parent.parent if found else None


@dataclass(frozen=True, slots=True)
class Taken:
    """What a kernel takes of a GPU: threads a block, registers a thread, bytes a thread that registers have no room
    for, and bytes of shared memory a block."""

    threads: int
    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class NvrtcCompiler:
    """Called as `adapters.kernels.text.compile_kernel`: what it returns compiles the text for every architecture, notes
    in `taken` what it takes under (name, architecture), and computes by `run`, which compiles for the processor. Raises
    RuntimeError with what the compiler says."""

    run: Compiler
    taken: dict[tuple[str, str], Taken] = field(default_factory=dict)

    def __call__(
        self, device: Device, name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
    ) -> Launch:
        launch = self.run(device, name, inputs, outputs, source, header)

        def compiled_and_run(**call: Any) -> Sequence[mx.array]:
            parameters = []
            for called, array in zip(inputs, call["inputs"], strict=True):
                parameters.append(f"const {NAMES[array.dtype]}* {called}")
                if f"{called}_shape" in source and array.ndim:
                    parameters.append(f"const __grid_constant__ Shape {called}_shape")
            for called, dtype in zip(outputs, call["output_dtypes"], strict=True):
                parameters.append(f"{NAMES[dtype]}* {called}")
            template = [
                f"  using {key} = {NAMES[value]};"
                if isinstance(value, mx.Dtype)
                else f"  constexpr int {key} = {value};"
                for key, value in call["template"]
            ]
            text = AROUND.format(
                dimensions=MOST_DIMENSIONS,
                header=header,
                parameters=",\n    ".join(parameters),
                template="\n".join(template),
                source=source,
            )
            for architecture in ARCHITECTURES:
                self.taken[name, architecture] = compiled(text, architecture, call["threadgroup"][0])
            return launch(**call)

        return compiled_and_run


@cache
def compiled(text: str, architecture: str, threads: int) -> Taken:
    home = toolkit()
    if home is None:
        raise RuntimeError("NVIDIA's compiler is not installed: `make test-nvrtc` installs it.")
    library = ctypes.CDLL(str(next(home.glob("lib/libnvrtc.so.*"))))
    folders = [home / "include", home / "include" / "cccl"]
    options = [f"--gpu-architecture={architecture}", "--std=c++20", "--ptxas-options=-v", "-default-device"]
    words = [option.encode() for option in (*options, *(f"-I{folder}" for folder in folders))]
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    try:
        failed = library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    said = log.value.decode()
    if failed:
        raise RuntimeError(said)
    return Taken(
        threads=threads,
        registers=int(re.findall(r"Used (\d+) registers", said)[0]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared=sum(map(int, re.findall(r"(\d+) bytes smem", said))),
    )
