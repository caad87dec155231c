"""A model that was cut is tried once before it serves: sums over ranks have been right on short prompts and wrong on
long ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable

log = logging.getLogger("rollout_server.engine.ranks")

LENGTHS = (8, 3000)
"""Tokens of the prompts that are tried; of a shorter context, as many as it holds."""


def check_cut(module: Any, whole: Callable[[], Any], ranks: Ranks, vocabulary: int, longest: int) -> None:
    """Compares the first block with that of the same model uncut, and every rank's logits with rank 0's. `whole` makes
    a module whose weights are read only where they are used.

    Raises `EngineUnavailable` on every rank, where any of them found a difference that rounding does not explain."""
    twin, dtype = whole(), _first_block(module, [0]).dtype
    # float32 sums differ by their order alone; the half precisions round what each rank brings.
    tolerance = 1e-4 if dtype == mx.float32 else 0.05
    for length in LENGTHS:
        tokens = [(7 * i + 3) % vocabulary for i in range(min(length, longest - 1))]
        block, logits = _first_block(module, tokens), ranks.every(_logits(module, tokens))
        gaps = _gap(_host(block), _host(_first_block(twin, tokens))), _gap(logits, logits[:1])
        found = ranks.every(mx.array(gaps)) / tolerance
        if not bool((found <= 1).all()):
            worst = int(np.argmax(found.max(axis=1)))
            raise EngineUnavailable(
                f"{ranks.size} ranks do not compute this model as one does: with a prompt of {len(tokens)} tokens rank "
                f"{worst} has {_spoken(found[worst])} as much as rounding explains. Nothing can be served so: try "
                "another --backend, or serve without --tensor-parallel."
            )
        log.info(
            "%d ranks agree on a prompt of %d tokens: the first block is within %.2g of what rounding explains, logits "
            "of the ranks within %.2g.", ranks.size, len(tokens), *found.max(axis=0),
        )  # fmt: skip


def _spoken(found: np.ndarray) -> str:
    return f"{found[0]:.3g} times in its first block, and {found[1]:.3g} times in its logits,"


def _host(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32))


def _gap(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, next to the largest value where that is more than one; NaN where there is one."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def _first_block(module: Any, tokens: list[int]) -> mx.array:
    """What the first of a module's blocks gives for a prompt; nothing behind it is computed."""
    layers = next(part["layers"] for _, part in module.named_modules() if isinstance(part.get("layers"), list))
    watched = _Watched(layers[0])
    layers[0] = watched
    try:
        module(mx.array([tokens], dtype=mx.int32))
    finally:
        layers[0] = watched.block
    made: mx.array = watched.made[0] if isinstance(watched.made, tuple) else watched.made
    mx.eval(made)
    return made


class _Watched:
    """A block that notes what it gives."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.made: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.made = self.block(*args, **kwargs)
        return self.made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _logits(module: Any, tokens: list[int]) -> mx.array:
    """float32 logits [V] behind a prompt, whose head is read at one token."""
    caches = make_prompt_cache(module)
    module(mx.array([tokens[:-1]], dtype=mx.int32), cache=caches)
    mx.eval([cache.state for cache in caches])
    logits: mx.array = module(mx.array([tokens[-1:]], dtype=mx.int32), cache=caches)[0, -1].astype(mx.float32)
    mx.eval(logits)
    return logits
