"""What every replica of a fleet has to have in common with the others, or two rows of one seed would differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.errors import Conflict
from rollout_server.fleet.wire import libraries


class Terms:
    """One per fleet. What the controller was told of dtype, bits and context holds; the first replica says the rest."""

    def __init__(self, options: EngineOptions) -> None:
        self.base: str | None = None
        """The digest of the controller's own copy of the model, where replicas have theirs from elsewhere."""
        self._bits, self._context = options.kv_bits, options.context_length
        self._first: ModelInfo | None = None
        self._libraries = libraries()

    def check(self, id: str, info: ModelInfo, installed: Mapping[str, str]) -> None:
        """Raises `Conflict` with all that differs; the first that does not is what later ones are compared with."""
        if unlike := list(self._unlike(info, installed)):
            raise Conflict(
                f"Replica {id} is not taken: {', '.join(unlike)}. Start it with the model, the options and the "
                f"versions of the others.{self._way_on(info)}"
            )
        self._first = self._first or info

    def _way_on(self, info: ModelInfo) -> str:
        """What to do where only the first replica said which context the fleet has, which may be there no more."""
        first = self._first
        if self._context is not None or not self.base or first is None or info.max_model_len == first.max_model_len:
            return ""
        return (
            " The first replica said that context, and it holds until the controller ends: start this one with "
            f"--context-length {first.max_model_len}, or the controller anew with the --context-length that all shall "
            "have."
        )

    def _unlike(self, info: ModelInfo, installed: Mapping[str, str]) -> Iterator[str]:
        first = self._first or info
        # What this machine starts was given its options, and says itself where a model cannot follow them.
        context = self._context if self.base and self._context and self._first is None else first.max_model_len
        expected = (
            ("base", info.digest, self.base or first.digest),
            ("dtype", info.dtype, first.dtype),
            ("kv_bits", info.kv_bits, self._bits),
            ("context", info.max_model_len, context),
            *((name, installed.get(name, "not there"), version) for name, version in self._libraries.items()),
        )
        for what, has, wanted in expected:
            if has != wanted:
                yield f"its {what} is {has}, and the fleet's is {wanted}"


def with_least_room(told: ModelInfo, joined: ModelInfo) -> ModelInfo:
    """`told` with the KV of the replica where the fewest tokens have room: a row that is taken has to fit wherever it
    goes."""
    if _tokens_of(joined) >= _tokens_of(told):
        return told
    return replace(
        told,
        kv_memory=joined.kv_memory,
        kv_bytes_per_token=joined.kv_bytes_per_token,
        kv_bytes_per_row=joined.kv_bytes_per_row,
    )


def _tokens_of(info: ModelInfo) -> int:
    """How long a row can be whose KV fits, as far as its memory says."""
    return (info.kv_memory - info.kv_bytes_per_row) // max(1, info.kv_bytes_per_token)
