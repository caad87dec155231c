"""Heads: label scores of hidden states. A head is no layer of the forward. It is applied in float32 to the states of
those positions that were asked for, with the arrays of their version, so that versions with heads share a batch with
others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

HEADS = ("score", "classifier")
"""What transformers and PEFT call a head's module."""
LAYER = re.compile(r"(?:(\d+)\.)?(weight|bias)")


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """One linear layer, or two with a ReLU between them."""

    layers: tuple[tuple[mx.array, mx.array | None], ...]
    """Weight [out, in] and bias [out] of each, float32."""

    @property
    def labels(self) -> int:
        return int(self.layers[-1][0].shape[0])

    @property
    def width(self) -> int:
        """Numbers in a hidden state that it reads."""
        return int(self.layers[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer if array is not None)

    def __call__(self, states: mx.array) -> mx.array:
        """float32 [N, width] → float32 [N, labels]."""
        for index, (weight, bias) in enumerate(self.layers):
            states = mx.maximum(states, 0.0) if index else states
            states = states @ weight.T if bias is None else mx.addmm(bias, states, weight.T)
        return states


def head_of(tensors: Mapping[str, mx.array]) -> Head | None:
    """The head whose tensors have these names: `score.weight` with or without `score.bias`, or with two layers
    `score.0.weight` and `score.2.weight`, as Qwen's reward models have it. None for anything else."""
    prefixes = {name.partition(".")[0] for name in tensors}
    if len(prefixes) != 1 or not prefixes <= set(HEADS):
        return None
    parts: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        match = LAYER.fullmatch(name.partition(".")[2])
        if match is None:
            return None
        parts.setdefault(match[1] or "", {})[match[2]] = array.astype(mx.float32)
    if sorted(parts) not in ([""], ["0", "2"]):
        return None
    layers = [(parts[index].get("weight"), parts[index].get("bias")) for index in sorted(parts)]
    made = tuple((weight, bias) for weight, bias in layers if weight is not None)
    return Head(made) if len(made) == len(layers) and _chained(made) else None


def _chained(layers: tuple[tuple[mx.array, mx.array | None], ...]) -> bool:
    """True where each layer takes what the one before gives."""
    if any(weight.ndim != 2 for weight, _ in layers):
        return False
    if any(bias is not None and bias.shape != weight.shape[:1] for weight, bias in layers):
        return False
    return all(before[0].shape[0] == after[0].shape[1] for before, after in itertools.pairwise(layers))
