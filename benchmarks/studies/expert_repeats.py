"""Asks whether mlx-lm's block of stacked experts gives one result for one input, however often it is asked.

`python -m benchmarks.studies.expert_repeats [--repeats 200]` asks with few choices, which are taken as they come, and
with many, which the block sorts by expert; it prints how many repeats differ from the first and by how much.
"""

from __future__ import annotations

import argparse

from rollout_server.machine.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU  # noqa: E402

WIDTH, HIDDEN, EXPERTS, CHOICES = 64, 96, 4, 2
TOKENS = (20, 70, 700)
SAME = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    mx.random.seed(0)
    block = SwitchGLU(WIDTH, HIDDEN, EXPERTS)
    mx.eval(block.parameters())
    for tokens in TOKENS:
        x = mx.random.normal((1, tokens, WIDTH))
        choices = mx.random.randint(0, EXPERTS, (1, tokens, CHOICES)).astype(mx.uint32)
        first = np.array(block(x, choices))
        gaps = [float(np.abs(np.array(block(x, choices)) - first).max()) for _ in range(repeats)]
        differ = sum(gap > SAME for gap in gaps)
        print(f"{tokens * CHOICES:5} choices: {differ} of {repeats} repeats differ, by at most {max(gaps):.2g}")


if __name__ == "__main__":
    main()
