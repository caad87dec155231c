"""Few numbers are those that they are, however long the array is that they lie in."""

from __future__ import annotations

import mlx.core as mx
import pytest

from adapters.kernels.numbers import LEAST, device_numbers


@pytest.mark.parametrize("count", range(LEAST + 2))
@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32], ids=str)
def test_they_are_as_given(count: int, dtype: mx.Dtype) -> None:
    found = device_numbers([7 + each for each in range(count)], dtype)
    assert found.dtype == dtype and found.tolist() == [7 + each for each in range(count)]
    assert LEAST * dtype.size > 8, "what MLX keeps in the host's memory"
