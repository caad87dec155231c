"""How fast this device reads with encoders, and whether its numbers are those of the CPU.

`python -m benchmarks.studies.encoders [--rows 256] [--dtype bfloat16]` makes a body of each family with random weights
in the size of its base model. The first lines compare states in float32 with the CPU's, of sequences of several lengths
together; the table says how many tokens a second are read, of equal lengths and of mixed ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

from rollout_server.engine.model.checkpoint.meaning import meaning_of  # noqa: E402
from rollout_server.engine.model.encoders.passages import groups, width_of  # noqa: E402
from rollout_server.models.encoders.families import ENCODERS  # noqa: E402

DEBERTA_V3 = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
}  # fmt: skip
BASES = {
    "bert": {},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "distilbert": {},
    "modernbert": {},
    "deberta-v2": DEBERTA_V3,
}
COMPARED = (3, 100, 511)
REPEATS = 5


def body_of(kind: str) -> nn.Module:
    """With weights as they are after training: products keep the size of what they get."""
    family = ENCODERS[kind]
    mx.random.seed(1)
    body: nn.Module = family.body(family.arguments_of(meaning_of({"model_type": kind, **BASES[kind]}).fields))
    body.eval()
    body.update(tree_map(lambda array: array + 0.02 * mx.random.normal(array.shape), body.parameters()))
    mx.eval(body.parameters())
    return body


def batch(lengths: Sequence[int]) -> tuple[mx.array, mx.array | None]:
    width = lengths[0] if len(set(lengths)) == 1 else min(width_of(max(lengths)), 512)
    ids = np.random.default_rng(0).integers(10, 30_000, (len(lengths), width)).astype(np.int32)
    return mx.array(ids), None if width == min(lengths) else mx.array(lengths, mx.int32)


def furthest(body: nn.Module) -> tuple[float, float]:
    """The largest difference from the CPU, and the largest state."""
    ids, lengths = batch(COMPARED)
    found = np.array(body(ids, None, lengths))
    with mx.stream(mx.cpu):
        expected = np.array(body(ids, None, lengths))
    kept = np.arange(ids.shape[1]) < np.array(COMPARED)[:, None]
    return float(np.abs(found - expected)[kept].max()), float(np.abs(expected[kept]).max())


def rate(body: nn.Module, lengths: Sequence[int], budget: int) -> float:
    """Tokens a second, padding not counted; the best of `REPEATS`."""
    batches = [batch([lengths[index] for index in group]) for group in groups(lengths, budget)]
    best = float("inf")
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        for ids, kept in batches:
            mx.eval(body(ids, None, kept))
        best = min(best, time.perf_counter() - began)
    return sum(lengths) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--budget", type=int, default=32_768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    asked = parser.parse_args()
    mixed = np.random.default_rng(3).integers(16, 512, asked.rows).tolist()
    print(f"{mx.default_device()}; {asked.rows} rows, forwards of at most {asked.budget} tokens, {asked.dtype}")
    for kind in BASES:
        body = body_of(kind)
        gap, largest = furthest(body)
        body.update(tree_map(lambda array: array.astype(getattr(mx, asked.dtype)), body.parameters()))
        rates = [rate(body, lengths, asked.budget) for lengths in ([128] * asked.rows, [512] * asked.rows, mixed)]
        print(
            f"{kind:11} float32 off the CPU's by {gap:.1e} of {largest:.1f}; tokens a second: "
            f"{rates[0]:9,.0f} of 128, {rates[1]:9,.0f} of 512, {rates[2]:9,.0f} of 16 to 511"
        )


if __name__ == "__main__":
    main()
