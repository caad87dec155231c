"""Few whole numbers from the host that many kernels of a step read: slots and positions of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

LEAST = 4
"""MLX for CUDA (0.32.4) keeps arrays of up to 8 bytes in memory that the host shares. Every launch that reads one waits
for it: the adapters' kernels took 15 to 26 µs with a slot in 4 bytes, and 6 to 17 with the same in 16 (H200)."""


def device_numbers(values: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """The values in a dtype of 32 bits, [len(values)], in memory of the device however few they are."""
    return mx.array([*values, *[0] * (LEAST - len(values))], dtype=dtype)[: len(values)]
