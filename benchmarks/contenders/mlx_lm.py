"""mlx-lm's continuous batching on the same prompts, at its documented best settings."""

from __future__ import annotations

import time

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from benchmarks.measure import Load


class BatchGeneratorDecode:
    """`BatchGenerator` at temperature 1 with all rows prefilled in one batch, so none waits for another.

    With `top_p` every row has its own filter between 0.9 and 1.0, which takes a sampler object for each row; without,
    one shared sampler serves the batch in a single call. It computes log-probabilities of the whole vocabulary either
    way; they are left on the device, unread.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]], load: Load, *, top_p: bool = False) -> None:
        self.name = "BatchGenerator, top-p by row" if top_p else "BatchGenerator"
        self._model = model
        self._prompts = prompts
        self._load = load
        self._samplers = None
        if top_p:
            last = max(1, load.rows - 1)
            self._samplers = [make_sampler(1.0, top_p=0.9 + 0.1 * row / last) for row in range(load.rows)]

    def run(self) -> tuple[int, float]:
        rows, steps = self._load.rows, self._load.steps
        generator = BatchGenerator(
            self._model,
            max_tokens=steps + 1,
            sampler=make_sampler(1.0),
            completion_batch_size=rows,
            prefill_batch_size=rows,
        )
        generator.insert(self._prompts, samplers=self._samplers)
        read = len(generator.next_generated())
        begin = time.perf_counter()
        while read < rows * (steps + 1):
            read += len(generator.next_generated())
        seconds = time.perf_counter() - begin
        mx.synchronize(generator.stream)
        generator.close()
        return rows * steps, seconds
