"""Asks what the device computes, and whether it still does. After an access that a GPU does not survive every later
call of the process fails as well, so that a batch which is rebuilt would fail its rows for ever."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.model.checkpoint.corrections.turning import ropes


def device_fault() -> str | None:
    """What the device answers instead of the sum of two numbers; None where it computes it."""
    try:
        total = mx.sum(mx.ones((2,))).item()
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None if total == 2 else f"1 + 1 = {total}"


def rows_turned(module: nn.Module, heads: int, rows: int, turn: Callable[..., mx.array] = mx.fast.rope) -> int:
    """How many of `rows` rows, halved until it works, this device turns in one step of a model with so many heads. On
    CUDA MLX cannot launch its rotary kernel for many rows where less than 32 numbers of a head are turned."""
    for dims in sorted({dims for _, _, dims in ropes(module)}):
        while rows > 1 and not _turns(turn, rows, heads, dims):
            rows //= 2
    return rows


def _turns(turn: Callable[..., mx.array], rows: int, heads: int, dims: int) -> bool:
    x, offset = mx.zeros((rows, heads, 1, dims)), mx.zeros((rows,), mx.int32)
    try:
        mx.eval(turn(x, dims, traditional=False, base=1e4, scale=1.0, offset=offset))
    except RuntimeError:
        return False
    return True
