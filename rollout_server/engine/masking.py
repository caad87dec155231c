"""The masks of a step: what the grammars of its rows let come next."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rollout_server.engine.sampling.filters import RowSubset
from rollout_server.engine.sampling.grammars import MaskFiller, hold_back
from rollout_server.engine.sampling.logits_processors import ends_of
from rollout_server.engine.sequence import Row
from rollout_server.errors import GrammarFault


class GrammarMasks:
    """`eos` are the model's end tokens."""

    def __init__(self, vocabulary: int, eos: frozenset[int]) -> None:
        self._filler = MaskFiller(vocabulary)
        self._eos = eos

    def of(self, rows: Sequence[tuple[int, Row]], size: int) -> tuple[RowSubset | None, list[Row]]:
        """Masks for the next token of these (place, row), all whose tokens have been recorded, among `size` places;
        and the rows that failed because their grammars cannot be followed any further."""
        chosen = sorted(
            ((place, row) for place, row in rows if row.running and row.follower is not None), key=lambda each: each[0]
        )
        followers = [row.follower for _, row in chosen if row.follower is not None]
        if not followers:
            return None, []
        words = self._filler.fill(followers)
        failed = []
        for mask, (_, row), follower in zip(words, chosen, followers, strict=True):
            sampling, index = row.group.request.sampling, len(row.token_ids)
            if follower.fault is not None:
                # Whatever it draws is thrown away.
                mask[:] = 2**32 - 1
                row.fail(GrammarFault(f"The grammar cannot be followed beyond token {index}: {follower.fault}."))
                failed.append(row)
            elif index < sampling.min_tokens:
                hold_back(mask, ends_of(sampling, self._eos))
        places = None if len(chosen) == size else mx.array([place for place, _ in chosen], dtype=mx.int32)
        return RowSubset(places, mx.array(words)), failed
