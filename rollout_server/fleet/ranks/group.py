"""MLX's group of ranks, of which this process is one."""

from __future__ import annotations

import mlx.core as mx

from rollout_server.engine.messages.options import RankOptions
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable


def join(ranks: RankOptions) -> Ranks:
    """Waits for all ranks. Raises `EngineUnavailable` where MLX cannot make a group of them."""
    if not mx.distributed.is_available(ranks.backend):
        raise EngineUnavailable(
            f"The MLX that is installed here has no backend {ranks.backend}: name another one with --backend."
        )
    try:
        group = mx.distributed.init(strict=True, backend=ranks.backend)
    except (RuntimeError, ValueError) as error:
        raise EngineUnavailable(f"The ranks did not meet: {' '.join(str(error).split())[:300]}") from error
    if group.size() != ranks.size:
        raise EngineUnavailable(
            f"--tensor-parallel is {ranks.size}, and {group.size()} ranks were launched: give both the same number."
        )
    return Ranks(group)
