"""Every kernel's text for CUDA is compiled by NVIDIA's own compiler, which needs no GPU (`make test-nvrtc`)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.kernels.decode import DecodeKernel
from adapters.kernels.low_rank import LowRank
from adapters.kernels.matrix import MatrixKernel
from adapters.kernels.text import Compiler
from rollout_server.engine.model.attention.kernel import RowKernel
from tests.engine.model.attention.test_kernel import a_step
from tests.support.numbers.host_kernels import MOST_SHARED, host_compiler
from tests.support.numbers.nvrtc import ARCHITECTURES, NvrtcCompiler, toolkit
from tests.support.numbers.test_host_kernels import add_products, attend, filter_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

REGISTERS = 65_536
"""Of a multiprocessor, on every architecture here."""


@pytest.fixture
def compiler(tmp_path_factory: pytest.TempPathFactory) -> NvrtcCompiler:
    if toolkit() is None:
        pytest.skip("NVIDIA's compiler is not installed: `make test-nvrtc` installs it.")
    return NvrtcCompiler(host_compiler(tmp_path_factory))


def attend_in_every_dtype(compiler: Compiler) -> None:
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        for options in ({}, {"packed": True}, {"sinks": True, "window": 24}):
            RowKernel("cuda", compiler)(a_step([3, 40, 62], width=128, dtype=dtype, **options))


def add_products_of_several_layers(compiler: Compiler) -> None:
    """Three layers of one input, with a gain and a bias, in every dtype."""
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        base = nn.Linear(64, 96)
        x = mx.random.normal((5, 1, 64)).astype(dtype)
        layer = LowRank(
            base(x.astype(mx.float32)).astype(dtype), mx.zeros((2, 8, 64), dtype), mx.zeros((2, 8, 96), dtype),
            mx.ones((2, 96)), mx.zeros(96),
        )  # fmt: skip
        for kind in (DecodeKernel, MatrixKernel):
            if (kernel := kind("cuda", compiler)).takes(x, (96, 64), 8, dtype):
                kernel(x, mx.array([1], dtype=mx.uint32), [layer] * 3)


@pytest.mark.parametrize(
    "use", [attend, attend_in_every_dtype, add_products, add_products_of_several_layers, filter_rows]
)
def test_what_it_makes_of_a_kernel_fits_a_gpu(use: Callable[[Compiler], None], compiler: NvrtcCompiler) -> None:
    use(compiler)
    assert {architecture for _, architecture in compiler.taken} == set(ARCHITECTURES)
    for (name, architecture), taken in compiler.taken.items():
        assert taken.spilled == 0, (name, architecture, taken)
        assert taken.shared <= MOST_SHARED["cuda"], (name, architecture, taken)
        # Or a block could not be launched.
        assert taken.registers * taken.threads <= REGISTERS, (name, architecture, taken)


def test_a_text_that_is_wrong_is_an_error(compiler: NvrtcCompiler) -> None:
    kernel = compiler("cuda", "wrong", ["x"], ["y"], "  y[0] = nowhere;", "")
    with pytest.raises(RuntimeError, match='"nowhere" is undefined'):
        kernel(inputs=[mx.zeros(8)], template=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)],
               output_dtypes=[mx.float32])  # fmt: skip
