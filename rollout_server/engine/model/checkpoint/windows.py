"""Sliding windows that config.json asks for and those that the loaded model has. Where they differ, the first tokens up
to the smaller window are exact, and a longer text would be read by another model than the trainer's."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from rollout_server.engine.model.checkpoint.family import Family
from rollout_server.engine.model.checkpoint.meaning import Meaning
from rollout_server.engine.model.checkpoint.plan import Bound


def window_bounds(module: nn.Module, said: Meaning, family: Family) -> tuple[Bound, ...]:
    """At most one bound."""
    wanted = _said(said)
    if wanted is None:
        return ()
    found = [_window(cache) for cache in make_prompt_cache(module)]
    if len(found) != len(wanted):
        # Layers that share their cache, or have none: only which windows there are can be compared.
        if {w for w in wanted if w} == {f for f in found if f}:
            return ()
        found = [None] * len(wanted)
    differ = [(w, f) for w, f in zip(wanted, found, strict=True) if f != -1 and w != f]
    if not differ:
        return ()
    tokens = min(size for pair in differ for size in pair if size is not None)
    where = "every layer" if len(differ) == len(wanted) else f"{len(differ)} of {len(wanted)} layers"
    named = "attention_chunk_size" if tokens == said.get("attention_chunk_size") else "sliding_window"
    return (Bound(tokens, f"config.json and {family.code} differ in the {named} of {where} beyond these tokens"),)


def _said(said: Meaning) -> list[int | None] | None:
    """Per layer the window; None if the file says nothing that could be compared."""
    layers, kinds = said.get("num_hidden_layers"), said.get("layer_types")
    if not said.known or not isinstance(layers, int):
        return None
    window, chunk = said.get("sliding_window") or None, said.get("attention_chunk_size") or None
    if not isinstance(kinds, list) or len(kinds) != layers:
        return [window] * layers
    sizes = {"sliding_attention": window, "hybrid_sliding": window, "chunked_attention": chunk}
    return [sizes.get(kind) for kind in kinds]


def _window(cache: Any) -> int | None:
    """−1 for a state that is not columns."""
    if isinstance(cache, RotatingKVCache):
        return int(cache.max_size)
    if isinstance(cache, ChunkedKVCache):
        return int(cache.chunk_size)
    return None if isinstance(cache, KVCache) else -1
