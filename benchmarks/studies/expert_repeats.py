"""Asks whether a model with stacked experts gives one result for one input, however often it is asked.

`python -m benchmarks.studies.expert_repeats [--seconds 30] [--way mlx|unsorted|blocks|ours]` runs forwards of a small
gpt_oss, one by one and several in one evaluation, and prints how many differ from what the CPU computes, and by how
much. `mlx` is mlx-lm's own layer, which asks MLX for a product of choices sorted by expert; `unsorted` does not say
that they are; `blocks` multiplies all in blocks of 16 rows; `ours` is what the server uses. `MLX_USE_CUDA_GRAPHS=0`
leaves graphs out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from adapters.resident.layers import expert_product  # noqa: E402
from adapters.resident.layers.expert_product import use_expert_product  # noqa: E402
from tests.support import tiny_models  # noqa: E402

SHAPES = ((2, 16), (1, 48), (4, 17), (1, 33), (2, 64), (1, 130))
"""Rows and tokens of a forward: from 32 tokens on there are 64 choices, which mlx-lm sorts."""
SAME = 1e-2


def in_blocks_of_16(x: mx.array, stack: mx.array, experts: mx.array, *, in_order: bool) -> mx.array:
    if not in_order:
        return mx.gather_mm(x, stack, rhs_indices=experts)
    return expert_product.in_blocks(x, stack, experts, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--way", choices=["mlx", "unsorted", "blocks", "ours"], default="ours")
    options = parser.parse_args()
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as place:
        model = load_model(tiny_models.build("gpt_oss", Path(place)))[0]
    if options.way != "mlx":
        use_expert_product(model)
    if options.way == "blocks":
        expert_product.expert_product = in_blocks_of_16
    elif options.way == "unsorted":
        expert_product.FEW = 10**9
    draw = np.random.default_rng(0)
    inputs = [mx.array(draw.integers(0, model.args.vocab_size, shape)) for shape in SHAPES]
    expected = [np.array(model.model(each)) for each in inputs]
    mx.set_default_device(device)
    asked, wrong = 0, Counter[str]()
    began = time.perf_counter()
    while time.perf_counter() - began < options.seconds:
        found = [model.model(each) for each in inputs]
        if asked // len(inputs) % 2:
            mx.eval(found)
        for each, right, shape in zip(found, expected, SHAPES, strict=True):
            gap = float(np.abs(np.array(each) - right).max())
            if not gap <= SAME:
                wrong[f"{shape} by {gap:.2f}"] += 1
        asked += len(inputs)
    print(f"{options.way}: {wrong.total()} of {asked} forwards are wrong")
    for what, count in wrong.most_common():
        print(f"{count:6} {what}")


if __name__ == "__main__":
    main()
