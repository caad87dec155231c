"""Kernels for a GPU, run by this machine's processor: their own text, compiled by g++ behind headers that say what the
words of CUDA or of Metal mean here (`host_cuda.h`, `host_metal.h`).

Threads and blocks go on in any order that their barriers and shuffles allow (`host_block.cpp`), and what was not
written is NaN: a result that depends on an order, on a number outside an array or on what nobody wrote comes out wrong
here. Threads that wait for others in vain, vectors read where none may begin, and indices beyond an array's end are
errors. What this does not see: two threads that add to one number at once without saying so, in CUDA's text. Metal
gives such numbers a type of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shutil import which
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters.kernels.text import CONSTANT, Device

TEXTS: dict[str, Device] = {"CUDA's text": "cuda", "Metal's text": "metal"}
COMPILER = which("g++") if sys.platform == "linux" else None
"""Other systems' libraries do not let one thread be many; a Mac has a GPU of its own."""
OPTIONS = ("-O1", "-fPIC", "-U_FORTIFY_SOURCE")
HIDDEN = ("-fvisibility=hidden",)
"""Names of one kernel are not those of another."""
CHECKS = ("-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=bounds,alignment", "-pedantic-errors")
LANGUAGE = {"cuda": "-std=c++17", "metal": "-std=c++14"}
HERE = Path(__file__).parent
NAMES = {mx.float32: "float", mx.float16: "float16", mx.bfloat16: "bfloat16", mx.uint32: "unsigned", mx.int32: "int"}
MOST_SHARED = {"cuda": 48 * 1024, "metal": 32 * 1024}
"""Bytes of a block's shared memory."""
FENCE = 1 << 16
"""Bytes before and behind an array, which nobody may write."""

AROUND = """
#include "host_words.h"
#include "host_{device}.h"
{header}
#undef SHARED
#define SHARED SHARED_MEMORY
#ifdef MULTIPLY
#undef MULTIPLY
#define MULTIPLY(sums, a0, a1, a2, a3, b0, b1) \
  {{ const unsigned own[WORDS] = {{a0, a1, a2, a3, b0, b1}}; multiply<T>(sums, own); }}
#endif
#ifdef READ
#undef READ
#define READ(into, from) into = *(const uint4*)(from)
#endif
static void whole({parameters}) {{
{template}
{source}
}}
static void of_thread(void** given) {{
  whole({arguments});
}}
extern "C" __attribute__((visibility("default")))
const char* run(void** given, const unsigned* blocks, unsigned threads, unsigned most_shared) {{
  if (__stop_shared_memory - __start_shared_memory > most_shared) return "its shared memory is too large";
  return run_blocks(of_thread, given, blocks, threads, __start_shared_memory, __stop_shared_memory);
}}
"""


def host_compiler(folders: pytest.TempPathFactory) -> HostCompiler:
    """Skips the test where nothing can be compiled, and where arrays are a GPU's, which runs kernels itself. What was
    compiled is there for all tests of a run, in whichever process."""
    if COMPILER is None or mx.default_device() != mx.cpu:
        pytest.skip("There is no g++ on Linux here, or a GPU.")
    own = folders.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"
    folder.mkdir(exist_ok=True)
    return HostCompiler(folder)


@dataclass(frozen=True)
class HostCompiler:
    """Called as `adapters.kernels.text.compile_kernel`. What it compiled stays in the folder."""

    folder: Path

    def __call__(
        self, device: Device, name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, header: str
    ) -> HostKernel:
        return HostKernel(device, tuple(inputs), tuple(outputs), source, header, self.folder)


class FencedArray:
    """An array's bytes between fences, at a multiple of 16 as on a GPU. What nobody gave is NaN, but for the fences of
    what a kernel writes: NaN that was read outside one array is seen where it is written outside another."""

    def __init__(self, nbytes: int, given: np.ndarray | None = None) -> None:
        self._fence = 0xA5 if given is None else 0xFF
        self._all = np.full(nbytes + 2 * FENCE + 16, self._fence, dtype=np.uint8)
        begin = FENCE + -(self._all.ctypes.data + FENCE) % 16
        self._fences = self._all[:begin], self._all[begin + nbytes :]
        self.bytes = self._all[begin : begin + nbytes]
        self.bytes[:] = 0xFF if given is None else given.reshape(-1).view(np.uint8)

    @property
    def whole(self) -> bool:
        return all((fence == self._fence).all() for fence in self._fences)


@dataclass(frozen=True)
class HostKernel:
    """Called as what `mx.fast.cuda_kernel` returns. It computes at once, and leaves in an input what the kernel writes
    there. Raises RuntimeError with what the compiler says of its text, or with what goes wrong while it runs."""

    device: Device
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str
    folder: Path

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, int | mx.Dtype]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        if threadgroup[1:] != (1, 1) or grid[0] % threadgroup[0]:
            raise RuntimeError(f"A grid of {grid} threads is not made of whole rows of {threadgroup}.")
        own = [memory_of(array) for array in inputs]
        read = [FencedArray(array.nbytes, np.ascontiguousarray(array)) for array in own]
        kinds = list(zip(output_shapes, output_dtypes, strict=True))
        written = [FencedArray(int(np.prod(shape)) * dtype.size) for shape, dtype in kinds]
        shapes = [np.array(array.shape, dtype=np.int32) for array in inputs]
        given = [each.bytes.ctypes.data for each in (*read, *written)] + [shape.ctypes.data for shape in shapes]
        fault = self._library(inputs, output_dtypes, template).run(
            (ctypes.c_void_p * len(given))(*given),
            (ctypes.c_uint * 3)(grid[0] // threadgroup[0], *grid[1:]),
            ctypes.c_uint(threadgroup[0]),
            ctypes.c_uint(MOST_SHARED[self.device]),
        )
        if fault is not None:
            raise RuntimeError(fault.decode())
        names = (*self.inputs, *self.outputs)
        for name, each in zip(names, (*read, *written), strict=True):
            if not each.whole:
                raise RuntimeError(f"it writes outside {name}")
        for array, each in zip(own, read, strict=True):
            # MLX gives kernels a copy of what is not contiguous, and what is written there is lost.
            if array.flags.c_contiguous:
                array.reshape(-1).view(np.uint8)[:] = each.bytes
        return [
            mx.array(each.bytes.view(np.uint16 if dtype.size == 2 else np.uint32).reshape(shape)).view(dtype)
            for each, (shape, dtype) in zip(written, kinds, strict=True)
        ]

    def _library(
        self, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype], template: Sequence[tuple[str, int | mx.Dtype]]
    ) -> Any:
        text = self._text(inputs, outputs, template)
        around, built = self.folder / "host_block.so", self.folder / f"{sha256(text.encode()).hexdigest()[:16]}.so"
        if not around.exists():
            compiled([*OPTIONS, "-std=c++17", "-shared", str(HERE / "host_block.cpp")], around)
        if not built.exists():
            written = self.folder / f"{built.stem}-{os.getpid()}.cpp"
            written.write_text(text)
            language = [LANGUAGE[self.device], *CHECKS, "-I", str(HERE)]
            # The libraries of C++ are those of what runs the blocks: to link each kernel with them takes as long again.
            compiled([*OPTIONS, *HIDDEN, *language, "-nodefaultlibs", "-shared", str(written), str(around)], built)
        library = ctypes.CDLL(str(built))
        library.run.restype = ctypes.c_char_p
        return library

    def _text(
        self, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype], template: Sequence[tuple[str, int | mx.Dtype]]
    ) -> str:
        """As MLX writes it around a body: an input's shape is there if the body names it."""
        parameters, arguments = [], []
        for at, (name, array) in enumerate(zip(self.inputs, inputs, strict=True)):
            small = self.device == "metal" and array.size < CONSTANT
            kind = f"const {NAMES[array.dtype]}*"
            parameters.append(f"{f'Small<{NAMES[array.dtype]}>' if small else kind} {name}")
            arguments.append(f"{f'Small<{NAMES[array.dtype]}>' if small else ''}(({kind})given[{at}])")
            if f"{name}_shape" in self.source and array.ndim:
                parameters.append(f"const int* {name}_shape")
                arguments.append(f"(const int*)given[{len(inputs) + len(outputs) + at}]")
        for at, (name, dtype) in enumerate(zip(self.outputs, outputs, strict=True), len(inputs)):
            parameters.append(f"{NAMES[dtype]}* {name}")
            arguments.append(f"({NAMES[dtype]}*)given[{at}]")
        return AROUND.format(
            device=self.device,
            header=self.header,
            parameters=", ".join(parameters),
            template="\n".join(
                f"  typedef {NAMES[value]} {name};"
                if isinstance(value, mx.Dtype)
                else f"  constexpr int {name} = {value};"
                for name, value in template
            ),
            source=self.source,
            arguments=", ".join(arguments),
        )


def memory_of(array: mx.array) -> np.ndarray:
    """The array's own memory, with bfloat16, which numpy lacks, as uint16."""
    seen = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(array, seen)
    return np.asarray(memoryview(seen))


def compiled(command: Sequence[str], target: Path) -> None:
    """The target is there when it is whole: other processes may be making it."""
    unfinished = target.with_name(f"{target.name}-{os.getpid()}")
    command = [str(COMPILER), *command, "-o", str(unfinished)]
    # What it says is told in English whatever the terminal speaks.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    unfinished.rename(target)
