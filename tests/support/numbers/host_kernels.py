"""Kernels for a GPU, run by this machine's processor: their own text, compiled by g++ behind headers that say what the
words of CUDA or of Metal mean here. The threads of a block are threads, which meet at real barriers, so a missing one
is a race here as it is there."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import mlx.core as mx
import numpy as np

COMPILER = which("g++")

CUDA = """
#define __device__
#define __forceinline__ inline
#define __shared__ static
struct Place { unsigned x, y, z; };
thread_local Place threadIdx, blockIdx;
static void __syncthreads() { meeting->arrive_and_wait(); }
static unsigned atomicAdd(unsigned* cell, unsigned value) { return __atomic_fetch_add(cell, value, __ATOMIC_RELAXED); }
#define PLACES threadIdx = {thread, 0, 0}; blockIdx = {row, 0, 0};
"""

METAL = """
#define ulong unsigned long long
#define device
#define threadgroup
namespace metal {
using std::atomic_uint, std::memory_order_relaxed, std::atomic_fetch_add_explicit, std::atomic_load_explicit,
    std::atomic_store_explicit;
enum class mem_flags { mem_threadgroup };
static void threadgroup_barrier(mem_flags) { meeting->arrive_and_wait(); }
}
struct uint3 { uint x, y, z; };
thread_local uint3 thread_position_in_threadgroup, threadgroup_position_in_grid;
#define PLACES thread_position_in_threadgroup = {thread, 0, 0}; threadgroup_position_in_grid = {row, 0, 0};
"""

AROUND = """
#include <atomic>
#include <barrier>
#include <thread>
#include <vector>
struct uint4 {{ unsigned x, y, z, w; }};
static std::barrier<>* meeting;
{words}
{header}
#undef SHARED
#define SHARED static
static void kernel({parameters}) {{
{constants}
{source}
}}
extern "C" void run({parameters}, unsigned rows, unsigned threads) {{
  std::barrier<> together(threads);
  meeting = &together;
  std::vector<std::thread> block;
  for (unsigned thread = 0; thread < threads; thread++)
    block.emplace_back([=, &together] {{
      for (unsigned row = 0; row < rows; row++) {{
        PLACES
        kernel({arguments});
        together.arrive_and_wait();  // The next block has the same shared memory.
      }}
    }});
  for (auto& each : block) each.join();
}}
"""


@dataclass(frozen=True)
class HostKernel:
    """Called as what `mx.fast.cuda_kernel` returns, for arrays of uint32; compiled once for each template in a folder
    of its own. Raises RuntimeError with what the compiler says."""

    header: str
    source: str
    words: str
    folder: Path

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, int]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        given = [np.ascontiguousarray(np.array(array)) for array in inputs]
        found = [np.empty(shape, dtype=np.uint32) for shape in output_shapes]
        library = self._library(template)
        library.run(
            *[ctypes.c_void_p(array.ctypes.data) for array in (*given, *found)],
            ctypes.c_uint(grid[0] // threadgroup[0]),
            ctypes.c_uint(threadgroup[0]),
        )
        return [mx.array(array) for array in found]

    def _library(self, template: Sequence[tuple[str, int]]) -> Any:
        built = self.folder / ("_".join(str(value) for _, value in template) + ".so")
        if not built.exists():
            names = ("weights", "limits", "kept", "least")
            kinds = ("const unsigned*", "const unsigned*", "unsigned*", "unsigned*")
            text = AROUND.format(
                words=self.words,
                header=self.header,
                parameters=", ".join(f"{kind} {name}" for kind, name in zip(kinds, names, strict=True)),
                constants="\n".join(f"  constexpr int {name} = {value};" for name, value in template),
                source=self.source,
                arguments=", ".join(names),
            )
            written = built.with_suffix(".cpp")
            written.write_text(text)
            command = [str(COMPILER), "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
            done = subprocess.run([*command, "-o", str(built), str(written)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
        return ctypes.CDLL(str(built))
