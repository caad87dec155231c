"""One decode step's attention by a kernel in which every row reads its own columns.

MLX's fused kernels take no mask array on CUDA, and without them every row pays for the columns of the longest one. Here
neither a mask nor a width is needed, so that a step keeps its shape while rows grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from adapters.kernels.text import Compiler, Device, Launch, compile_kernel, constants, own_device
from rollout_server.engine.kv_cache.padded_layer import DecodeAttention
from rollout_server.engine.model.attention.source import attend_body, header, join_body

Part = Literal["whole", "part", "join"]
STEP_INPUTS = ("queries", "new_keys", "new_values", "keys", "values", "offsets")
LOG2_E = 1.4426950408889634
WIDTHS = (64, 80, 96, 112, 128, 256)
"""Head sizes."""
MOST_TOGETHER = 4
"""Query heads of one block: each needs registers for its query and its sum."""
FILLED = 512
"""Blocks that keep a large device busy; where rows and heads are fewer, the columns of a row are cut into parts."""
LEAST_PART, MOST_PARTS = 128, 32
"""Columns of a part, and parts of a row."""
SHARED_FLOATS = 4096
"""Floats in one block's shared memory, so that two of them fit into Metal's 32 KiB."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a kernel is compiled for."""

    width: int
    """Numbers of a head."""
    heads: int
    kv_heads: int
    dtype: str
    """The dtype of the queries, and of kept numbers that are not packed."""
    group: int
    """Numbers that share a scale where they are packed in 8 bits; 0 where they are not."""
    window: int
    """Columns that a token reads at most; 0: all."""
    sinks: bool
    scale: float

    @property
    def numbers(self) -> int:
        """Numbers that one lane reads at once."""
        return 4 if self.dtype == "float32" and not self.group else 8

    @property
    def lanes(self) -> int:
        """Lanes that read one vector: a power of two, since they add by shuffles."""
        needed = -(-self.width // self.numbers)
        return min(32, 1 << (needed - 1).bit_length())

    @property
    def reads(self) -> int:
        """Times that a lane reads for one vector."""
        return -(-self.width // (self.numbers * self.lanes))

    @property
    def words(self) -> int:
        """32-bit words of one kept vector."""
        if self.group:
            return self.width // 4 + 2 * (self.width // self.group)
        return self.width if self.dtype == "float32" else self.width // 2

    @property
    def chunks(self) -> int:
        """Blocks among which the query heads of one key and value head are shared out."""
        return -(-(self.heads // self.kv_heads) // MOST_TOGETHER)

    @property
    def together(self) -> int:
        return -(-(self.heads // self.kv_heads) // self.chunks)

    @property
    def warps(self) -> int:
        return 8 if 8 * self.together * (self.reads * self.lanes * self.numbers) <= SHARED_FLOATS else 4

    @property
    def constants(self) -> str:
        unroll = 4 if self.reads == 1 else 2
        return constants(
            WIDTH=self.width,
            KV_HEADS=self.kv_heads,
            SHARED_BY=self.heads // self.kv_heads,
            GQ=self.together,
            CHUNKS=self.chunks,
            WORDS=self.words,
            WARPS=self.warps,
            LANES=self.lanes,
            NV=self.reads,
            VEC=self.numbers,
            UNROLL=unroll,
            STRIDE=unroll * (32 // self.lanes),
            WINDOW=self.window,
            GROUP=self.group or 1,
            GROUPS=self.width // self.group if self.group else 0,
            SCALE=self.scale * LOG2_E,
        )


class RowKernel:
    """Attends by kernels, each compiled when it is first needed. It is an `Attend` of `kv_cache.padded_layer`: the new
    token's keys and values are written into the kept arrays, which stay the same arrays."""

    def __init__(self, device: Device, compiler: Compiler = compile_kernel) -> None:
        self._device, self._compiler = device, compiler
        self._kernels: dict[tuple[Geometry, Part], Launch] = {}

    def __call__(self, step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
        """Returns values [B, heads, 1, head size] in the dtype of the queries, and the arrays in which keys and values
        are kept now. Raises ValueError for what no kernel is written for."""
        geometry = geometry_of(step)
        rows, columns = step.keys.shape[0], step.keys.shape[2]
        shape, dtype = (rows, geometry.heads, 1, geometry.width), step.queries.dtype
        blocks = geometry.kv_heads * geometry.chunks
        parts = max(1, min(FILLED // (rows * blocks), columns // LEAST_PART, MOST_PARTS))
        inputs = [step.queries, step.new_keys, step.new_values, step.keys, step.values, step.offset]
        sinks = [] if step.sinks is None else [step.sinks]
        grid = (blocks, rows, parts)
        if parts == 1:
            out = self._run(geometry, "whole", inputs + sinks, 32 * geometry.warps, grid, shape, dtype)
        else:
            partial = (rows, geometry.heads, parts, geometry.width + 2)
            found = self._run(geometry, "part", inputs, 32 * geometry.warps, grid, partial, dtype)
            threads = -(-geometry.width // 32) * 32
            out = self._run(geometry, "join", [found, *sinks], threads, (geometry.heads, rows, 1), shape, dtype)
        return out, step.keys, step.values

    def _run(
        self,
        geometry: Geometry,
        part: Part,
        inputs: list[mx.array],
        threads: int,
        blocks: tuple[int, int, int],
        shape: tuple[int, ...],
        dtype: mx.Dtype,
    ) -> mx.array:
        if (geometry, part) not in self._kernels:
            self._kernels[geometry, part] = self._make(geometry, part)
        outputs = self._kernels[geometry, part](
            inputs=inputs,
            template=[("T", dtype)],
            grid=(blocks[0] * threads, *blocks[1:]),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape],
            output_dtypes=[mx.float32 if part == "part" else dtype],
        )
        return outputs[0]

    def _make(self, geometry: Geometry, part: Part) -> Launch:
        sinks = geometry.sinks and part != "part"
        names = ["partial"] if part == "join" else [*STEP_INPUTS]
        if part == "join":
            body = join_body(self._device, sinks=sinks)
        else:
            body = attend_body(self._device, packed=geometry.group > 0, split=part == "part", sinks=sinks)
        return self._compiler(
            self._device,
            f"row_attention_{part}",
            [*names, *(["sinks"] if sinks else [])],
            ["out"],
            geometry.constants + body,
            header(self._device, "packed" if geometry.group else geometry.dtype),
        )


def geometry_of(step: DecodeAttention) -> Geometry:
    """Raises ValueError for what no kernel is written for."""
    width, dtype = step.queries.shape[3], step.queries.dtype
    if width not in WIDTHS:
        raise ValueError(f"its heads have {width} numbers")
    if step.new_keys.shape[3] != step.new_values.shape[3]:
        raise ValueError("its keys and values differ in size")
    if dtype not in (mx.float32, mx.bfloat16, mx.float16) or (not step.group and step.keys.dtype != dtype):
        raise ValueError(f"its queries are {dtype} and its keys {step.keys.dtype}")
    if step.queries.shape[1] % step.keys.shape[1]:
        raise ValueError("its query heads do not share keys evenly")
    return Geometry(
        width=width,
        heads=step.queries.shape[1],
        kv_heads=step.keys.shape[1],
        dtype=str(dtype).removeprefix("mlx.core."),
        group=step.group,
        window=step.window or 0,
        sinks=step.sinks is not None,
        scale=step.scale,
    )


def row_kernel() -> RowKernel | None:
    """The attention kernel of the default device; None on a CPU, which has none."""
    device = own_device()
    return None if device is None else RowKernel(device)
