"""Keys and values in 8 bits: groups of numbers of a head, each with a scale and an offset of its own.

A vector becomes one run of 32-bit words: its codes, four a word, then its scales, then its offsets. So a layer keeps
one array for keys and one for values, as without packing, and all that copies, moves, frees or keeps KV is the same.
Scales are float32 whatever the model computes in: a bfloat16 one would be wrong by half a code at the end of its group.

Models get numbers of their own dtype back, one layer at a time. Attending to the codes (`QuantizedKVCache`) would save
that copy, but knows no attention sinks, and on a CPU reads a prompt more than four times as slowly, without the BLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

BITS = 8
GROUPS = (64, 32)
"""Numbers that share a scale: the first of these that divides the head."""
CODES_A_WORD = 32 // BITS


@dataclass(frozen=True, slots=True)
class Packing:
    """How vectors of `width` numbers are kept; read back as `dtype`."""

    width: int
    dtype: mx.Dtype

    @property
    def group(self) -> int:
        """Raises ValueError for a width that no group divides."""
        for size in GROUPS:
            if self.width % size == 0:
                return size
        raise ValueError(f"its heads have {self.width} numbers, which is no multiple of {GROUPS[-1]}")

    def pack(self, vectors: mx.array) -> mx.array:
        """[…, width] of any floating dtype → uint32 […, words]. Equal numbers give equal words."""
        # `mx.quantize` gives scales of the dtype that it gets.
        codes, scales, offsets = mx.quantize(vectors.astype(mx.float32), group_size=self.group, bits=BITS)
        return mx.concatenate([codes, scales.view(mx.uint32), offsets.view(mx.uint32)], axis=-1)

    def unpack(self, words: mx.array) -> mx.array:
        """uint32 […, words] → […, width]."""
        end, groups = self.width // CODES_A_WORD, self.width // self.group
        scales = words[..., end : end + groups, None].view(mx.float32)
        offsets = words[..., end + groups :, None].view(mx.float32)
        codes = words[..., :end].view(mx.uint8).astype(mx.float32)
        # By plain operations: `mx.dequantize` is three times as slow on a CPU, and no trace could fuse it.
        numbers = codes.reshape(*codes.shape[:-1], groups, self.group) * scales + offsets
        return numbers.reshape(codes.shape).astype(self.dtype)
