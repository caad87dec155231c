"""The decode kernel against plain operations: on this machine's GPU where it has one, and its text for CUDA and Metal
by the processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest

from rollout_server.engine.kv_cache.eight_bit import Packing
from rollout_server.engine.kv_cache.padded_layer import DecodeAttention
from rollout_server.engine.model.attention.kernel import WIDTHS, RowKernel, geometry_of, row_kernel
from rollout_server.engine.model.attention.plain import attend_plainly
from tests.laws.grids import corners, some_long
from tests.support.numbers.host_kernels import TEXTS, host_compiler

KINDS = ["the GPU", *TEXTS]
HEADS = {(16, 8): 128, (8, 1): 64, (7, 1): 64, (4, 4): 80, (12, 2): 128}


@pytest.fixture(scope="module", params=some_long(KINDS, *KINDS[:2]))
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowKernel:
    if request.param in TEXTS:
        return RowKernel(TEXTS[request.param], host_compiler(tmp_path_factory))
    found = row_kernel()
    if found is None:
        pytest.skip("There is no GPU.")
    return found


def a_step(
    offsets: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 64,
    columns: int = 64,
    dtype: mx.Dtype = mx.float32,
    packed: bool = False,
    sinks: bool = False,
    window: int | None = None,
) -> DecodeAttention:
    """Random numbers, and NaN wherever no row may read, unless it is `packed`."""
    rows, offset = len(offsets), mx.array(list(offsets), dtype=mx.int32)
    mx.random.seed(rows + columns + width)
    queries = mx.random.normal((rows, heads, 1, width)).astype(dtype)
    new = [mx.random.normal((rows, kv_heads, 1, width)).astype(dtype) for _ in range(2)]
    kept = [mx.random.normal((rows, kv_heads, columns, width)).astype(dtype) for _ in range(2)]
    unread = (mx.arange(columns) >= offset[:, None])[:, None, :, None]
    packings = None
    if packed:
        packings = Packing(width, dtype), Packing(width, dtype)
        new, kept = ([packings[0].pack(array) for array in arrays] for arrays in (new, kept))
    else:
        kept = [mx.where(unread, mx.nan, array).astype(dtype) for array in kept]
    step = DecodeAttention(
        queries, *new, *kept, offset, width**-0.5, window,
        mx.random.normal((heads,)).astype(dtype) if sinks else None, packings,
    )  # fmt: skip
    mx.eval(queries, new, kept, offset)
    return step


def assert_as_plainly(kernel: RowKernel, step: DecodeAttention) -> None:
    rows = mx.arange(step.keys.shape[0])
    twin = replace(step, keys=mx.take(step.keys, rows, axis=0), values=mx.take(step.values, rows, axis=0))
    mx.eval(twin.keys, twin.values)
    expected, _, _ = attend_plainly(twin)
    found, keys, values = kernel(step)
    mx.eval(expected, found)
    # Values are of order one: each side rounds once to the dtype, and float32 sums differ by their order.
    assert (
        mx.max(mx.abs(found.astype(mx.float32) - expected.astype(mx.float32))) <= 4 * mx.finfo(found.dtype).eps + 1e-5
    )
    live = step.offset < step.keys.shape[2] - 1
    for kept, new in ((keys, step.new_keys), (values, step.new_values)):
        written = mx.all(kept[rows, :, step.offset] == new[:, :, 0], axis=(1, 2))
        assert mx.all(written | ~live)


@pytest.mark.parametrize(("width", "dtype"), corners(WIDTHS, [mx.float32, mx.bfloat16, mx.float16]), ids=str)
def test_every_head_size_and_dtype_at_odd_lengths(kernel: RowKernel, width: int, dtype: mx.Dtype) -> None:
    assert_as_plainly(kernel, a_step([0, 5, 30, 62, 63], width=width, dtype=dtype))


@pytest.mark.parametrize("kernel", KINDS, indirect=True)
@pytest.mark.parametrize(("heads", "kv_heads"), some_long(list(HEADS), (16, 8), (7, 1)), ids=str)
def test_query_heads_share_keys(kernel: RowKernel, heads: int, kv_heads: int) -> None:
    width = HEADS[heads, kv_heads]
    step = a_step([0, 5, 30, 62, 63], heads=heads, kv_heads=kv_heads, width=width, dtype=mx.bfloat16)
    assert_as_plainly(kernel, step)


@pytest.mark.parametrize(("window", "sinks"), corners([1, 24, 200], [False, True]))
def test_windows_and_sinks(kernel: RowKernel, window: int, sinks: bool) -> None:
    assert_as_plainly(kernel, a_step([0, window - 1, window, 255], columns=256, window=window, sinks=sinks))


@pytest.mark.parametrize(("offsets", "sinks"), corners([[1030], [301, 1054], [1055]], [False, True]), ids=str)
def test_few_rows_are_read_in_parts(kernel: RowKernel, offsets: list[int], sinks: bool) -> None:
    assert_as_plainly(kernel, a_step(offsets, columns=1056, sinks=sinks))
    assert_as_plainly(kernel, a_step(offsets, columns=1056, sinks=sinks, window=700))


@pytest.mark.parametrize("width", some_long([width for width in WIDTHS if width % 32 == 0], 96))
def test_eight_bits_are_read_as_packed(kernel: RowKernel, width: int) -> None:
    for dtype in (mx.float32, mx.bfloat16):
        assert_as_plainly(kernel, a_step([0, 5, 30, 62, 63], width=width, dtype=dtype, packed=True))
    assert_as_plainly(kernel, a_step([1000], width=width, columns=1056, packed=True))


@pytest.mark.parametrize("kernel", KINDS, indirect=True)
def test_a_row_is_the_same_alone_and_in_company(kernel: RowKernel) -> None:
    together = a_step([7, 40, 62, 3], dtype=mx.bfloat16)
    alone = replace(
        together,
        **{
            name: mx.take(getattr(together, name), mx.array([2]), axis=0)
            for name in ("queries", "new_keys", "new_values", "keys", "values", "offset")
        },
    )
    assert mx.array_equal(kernel(together)[0][2], kernel(alone)[0][0])


def test_what_no_kernel_is_written_for_is_said() -> None:
    with pytest.raises(ValueError, match="its heads have 48 numbers"):
        geometry_of(a_step([3], width=48))
    step = a_step([3])
    with pytest.raises(ValueError, match="its keys"):
        geometry_of(replace(step, queries=step.queries.astype(mx.bfloat16)))
