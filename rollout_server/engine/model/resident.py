"""The base in memory, as the rest of the engine uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from adapters.kernels.low_rank import LowRankKernel
from adapters.resident.cuts import Cut
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.store import KVStore
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.model.attention.choice import UNBOUND, ChosenAttention
from rollout_server.engine.model.forward.functions import bound
from rollout_server.engine.model.tasks.heads import Head
from rollout_server.engine.model.vision.sighted import logits_of, states_of
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.sight.features import Eyes
from rollout_server.engine.sight.seen import Seen


class VersionedModel(Protocol):
    """What versions are staged on: a decoder, or an encoder."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def dtype(self) -> mx.Dtype: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def adapter_kernel(self) -> LowRankKernel | None: ...

    @property
    def head(self) -> Head | None: ...

    @property
    def cuts(self) -> Mapping[str, Cut]: ...


@dataclass(frozen=True, slots=True, eq=False)
class ResidentModel:
    """The base in memory. `make_store` gives empty KV rows of the kind the self-test chose."""

    module: nn.Module
    tokenizer: Any
    """transformers' tokenizer for the engine thread (stop strings)."""
    host_tokenizer: Any
    """The same for the event loop: a tokenizer is not to be shared between threads."""
    dtype: mx.Dtype
    info: ModelInfo
    make_store: Callable[[], KVStore]
    compiles: bool = False
    """Decode steps are traced once for each shape, see `forward.compiled.CompiledDecode`."""
    attention: ChosenAttention = UNBOUND
    """How decode steps attend, and whose names are bound in every forward."""
    adapter_kernel: LowRankKernel | None = None
    """What adds low-rank products in decode steps, where it is right and faster on this device."""
    trunk: str = ""
    """Path of the part of `module` that gives hidden states; empty if none does."""
    filter_kernel: FilterKernel | None = None
    """What rows are filtered by, where this device has a kernel for it."""
    head: Head | None = None
    """What scores those states; `module` itself gives them then."""
    eyes: Eyes | None = None
    """What makes vectors of pictures; None for a model of text."""
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """How layers are cut over ranks, by path."""
    ranks: Ranks | None = None
    """Who else computes it; None where it is whole."""

    def forward(self, tokens: mx.array, caches: list[Any], seen: Seen | None = None, /) -> mx.array:
        """tokens int32 [B, N] → logits [B, N, V] in the model's dtype, lazily: the head runs only if they are read."""
        with bound(self.attention.modules):
            if seen is None:
                logits: mx.array = self.module(tokens, cache=caches)
                return logits
            states = states_of(self.module, self.trunk, tokens, caches, seen)
            return states if self.head is not None else logits_of(self.module, self.trunk, states)

    def hidden(self, tokens: mx.array, caches: list[Any], seen: Seen | None = None, /) -> mx.array:
        """tokens int32 [B, N] → states after the final norm [B, N, width], in the model's dtype, lazily."""
        with bound(self.attention.modules):
            if seen is not None:
                return states_of(self.module, self.trunk, tokens, caches, seen)
            states: mx.array = attrgetter(self.trunk)(self.module)(tokens, cache=caches)
        return states

    def make_padded(self) -> PaddedKV:
        """Empty rows with columns; only where `info.cache` is `slots`."""
        store = self.make_store()
        if not isinstance(store, PaddedKV):
            raise RuntimeError("A model with slot caches made another kind of store.")
        return store

    def make_caches(self) -> list[Any]:
        """Fresh mlx-lm caches for one sequence."""
        return make_prompt_cache(self.module)
