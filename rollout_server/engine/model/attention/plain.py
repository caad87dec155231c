"""The attention of a decode step by plain operations in float32: what kernels are compared with."""

from __future__ import annotations

import mlx.core as mx

from rollout_server.engine.kv_cache.padded_layer import DecodeAttention


def attend_plainly(step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
    """An `Attend` of `kv_cache.padded_layer`. Copies what it writes into, unless nothing else holds it."""
    rows = mx.arange(step.keys.shape[0])
    keys, values = step.keys, step.values
    keys[rows, :, step.offset] = step.new_keys[:, :, 0]
    values[rows, :, step.offset] = step.new_values[:, :, 0]
    read_keys, read_values = keys, values
    if step.packings is not None:
        read_keys, read_values = step.packings[0].unpack(keys), step.packings[1].unpack(values)
    shared_by = step.queries.shape[1] // keys.shape[1]
    columns = mx.arange(keys.shape[2])
    offset = step.offset[:, None, None]
    there = columns <= offset
    if step.window is not None:
        there = there & (columns > offset - step.window)
    queries = step.queries[:, :, 0].astype(mx.float32)
    queries = queries.reshape(queries.shape[0], -1, shared_by, queries.shape[-1])
    # Sums of products, since a GPU may multiply matrices in fewer bits.
    scores = mx.sum((queries * step.scale)[:, :, :, None] * read_keys.astype(mx.float32)[:, :, None], axis=-1)
    scores = mx.where(there[:, :, None], scores, -mx.inf)
    sinks = mx.full((1, 1, 1, 1), -mx.inf)
    if step.sinks is not None:
        sinks = step.sinks.astype(mx.float32).reshape(1, -1, shared_by, 1)
    highest = mx.maximum(mx.max(scores, axis=-1, keepdims=True), sinks)
    weights = mx.exp(scores - highest)
    weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + mx.exp(sinks - highest))
    # What is not read may be NaN, and 0 × NaN is NaN.
    read = mx.where(there[:, :, :, None], read_values.astype(mx.float32), 0.0)
    found = mx.sum(weights[..., None] * read[:, :, None], axis=-2).reshape(queries.shape[0], -1, 1, read.shape[-1])
    live = (step.offset < keys.shape[2] - 1)[:, None, None, None]
    return mx.where(live, found, 0.0).astype(step.queries.dtype), keys, values
