"""An encoder in memory, as the rest of the engine uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from rollout_server.engine.messages.options import Task
from rollout_server.engine.model.encoders.passages import Limits
from rollout_server.engine.model.encoders.pooling import Pooling
from rollout_server.models.encoders.heads import Headed


@dataclass(frozen=True, slots=True, eq=False)
class EncoderModel:
    """`module` and `tokenizer` belong to the thread that loaded them."""

    module: Any
    """The body alone where the task is `embed`, else a `Headed`; parameters have the names of the checkpoint."""
    tokenizer: Any
    task: Task
    labels: tuple[str | None, ...]
    """One for each label, None where config.json only numbers it; empty for vectors."""
    problem_type: str | None
    limits: Limits
    pad_id: int
    width: int
    """Numbers in a state of the body."""
    pooling: Pooling
    """How states become one vector; other tasks have no use for it."""
    dtype: mx.Dtype
    """The body's; heads and pooling are float32."""
    layers: dict[str, tuple[int, int]]
    """Every layer an adapter may target: parameter path → (out features, in features)."""

    @property
    def body(self) -> Any:
        """int32 [B, N] ids, types and [B] lengths → states [B, N, width]."""
        return self.module.body if isinstance(self.module, Headed) else self.module
