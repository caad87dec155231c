"""Where a process reward is read: the step tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rollout_server.errors import InvalidField
from rollout_server.http.service import Service
from rollout_server.quoting import counted, quoted
from rollout_server.schemas.pooling.inputs import Steps


def step_positions(steps: Steps, sequences: Sequence[Sequence[int]], service: Service) -> list[tuple[int, ...]]:
    """Places in each sequence, ascending. Raises `InvalidField` for what cannot be a place of it."""
    if steps.positions is not None:
        return _given(steps.positions, sequences)
    if steps.token_id is not None:
        if steps.token_id >= service.info.vocab_size:
            raise InvalidField(
                f"steps.token_id is {quoted(steps.token_id)}, which is outside the vocabulary of "
                f"{service.info.vocab_size} tokens.",
                param="steps.token_id",
            )
        mark: tuple[int, ...] = (steps.token_id,)
    else:
        mark = tuple(_encoded(steps.text or "", service.tokenizer))
    return [tuple(_ends(tuple(ids), mark)) for ids in sequences]


def _encoded(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidField(f"steps.text is {quoted(text)}, of which the tokenizer makes no token.", param="steps.text")
    return ids


def _ends(ids: tuple[int, ...], mark: tuple[int, ...]) -> list[int]:
    """The last token of every occurrence of `mark`."""
    length, last = len(mark), mark[-1]
    return [at for at, token in enumerate(ids) if token == last and ids[max(0, at - length + 1) : at + 1] == mark]


def _given(positions: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    if len(positions) != len(sequences):
        raise InvalidField(
            f"steps.positions has {counted(len(positions), 'list')} for {counted(len(sequences), 'sequence')}: send "
            "one for each.",
            param="steps.positions",
        )
    for index, (own, ids) in enumerate(zip(positions, sequences, strict=True)):
        if own and (own[-1] >= len(ids) or any(before >= after for before, after in pairwise(own))):
            raise InvalidField(
                f"steps.positions[{index}] has to be ascending and within the {counted(len(ids), 'token')} of its "
                "sequence.",
                param=f"steps.positions[{index}]",
            )
    return [tuple(own) for own in positions]
