"""MLX's group of ranks, of which this process is one."""

from __future__ import annotations

import time

import mlx.core as mx

from rollout_server.engine.messages.options import RankOptions
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.ranks.patience import patience

MEET_S, PAUSE_S = 120.0, 0.5
"""MLX gives up on a rank that is not there yet: on a busy machine one may start so much later than another."""
MET_S = 1.5 * MEET_S
"""The last try may take a while itself; and MLX does not give up at all on a rank that it expects to be called by."""


def join(ranks: RankOptions) -> Ranks:
    """Waits for all ranks. Raises `EngineUnavailable` where MLX cannot make a group of them."""
    if not mx.distributed.is_available(ranks.backend):
        raise EngineUnavailable(
            f"The MLX that is installed here has no backend {ranks.backend}: name another one with --backend."
        )
    until = time.monotonic() + MEET_S
    with patience(MET_S):
        while (group := _tried(ranks.backend, last=time.monotonic() >= until)) is None:
            time.sleep(PAUSE_S)
    if group.size() != ranks.size:
        raise EngineUnavailable(
            f"--tensor-parallel is {ranks.size}, and {group.size()} ranks were launched: give both the same number."
        )
    return Ranks(group)


def _tried(backend: str, *, last: bool) -> mx.distributed.Group | None:
    try:
        return mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        if last or "connect" not in str(error):
            raise EngineUnavailable(f"The ranks did not meet: {' '.join(str(error).split())[:300]}") from error
        return None
