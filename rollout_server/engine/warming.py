"""First uses on a GPU compile kernels, up to seconds each: done before the server says that it is ready."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from rollout_server.engine.sampling import prepare, sample, uniforms
from rollout_server.rollout import SamplingParams


def warm_sampler(vocabulary: int, dtype: mx.Dtype, rows: int) -> None:
    """Runs every kind of sampler once on `rows` rows of logits in the model's dtype."""
    logits = mx.zeros((rows, vocabulary), dtype=dtype)
    draws = mx.array(uniforms(range(rows), [0] * rows))
    for sampling, extras in _kinds():
        arrays = prepare(
            [sampling, *[SamplingParams(max_tokens=1)] * (rows - 1)],
            vocabulary,
            entropy=extras,
            top_logprobs=5 if extras else 0,
        )
        mx.eval(sample(logits, arrays, draws).arrays())


def _kinds() -> Iterator[tuple[SamplingParams, bool]]:
    yield SamplingParams(max_tokens=1), False
    yield SamplingParams(max_tokens=1), True
    yield SamplingParams(max_tokens=1, temperature=0.0), False
    yield SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9, top_k=50, min_p=0.01), False
    yield SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9), False
    yield SamplingParams(max_tokens=1, logit_bias=((0, 1.0),)), False
