"""Where a process reward is read: the step tokens of a sequence."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rollout_server.errors import InvalidField
from rollout_server.http.service import Service
from rollout_server.quoting import counted, quoted
from rollout_server.schemas.pooling.inputs import Steps


@dataclass(frozen=True, slots=True)
class SentText:
    """A sequence that came as text, or as messages, which a chat template made a text of."""

    text: str
    special: bool
    """True where the tokenizer put its special tokens around it."""


def step_positions(
    steps: Steps, sequences: Sequence[Sequence[int]], sent: Sequence[SentText | None], service: Service
) -> list[tuple[int, ...]]:
    """Places in each sequence, ascending; `sent` is None for those that came as token ids. Raises `InvalidField` for
    what cannot be a place of it, and for a text of which no token can be told."""
    if steps.positions is not None:
        return _given(steps.positions, sequences)
    if steps.token_id is not None:
        if steps.token_id >= service.info.vocab_size:
            raise InvalidField(
                f"steps.token_id is {quoted(steps.token_id)}, which is outside the vocabulary of "
                f"{service.info.vocab_size} tokens.",
                param="steps.token_id",
            )
        return [tuple(_ends(tuple(ids), (steps.token_id,))) for ids in sequences]
    mark, tokenizer = steps.text or "", service.tokenizer
    own = tuple(_encoded(mark, tokenizer))
    found = []
    for index, (ids, source) in enumerate(zip(sequences, sent, strict=True)):
        places = None if source is None else _in_text(mark, source, ids, tokenizer)
        if places is None:
            places = _ends(tuple(ids), own)
            _refuse_hidden(mark, len(places), ids, index, tokenizer)
        found.append(tuple(places))
    return found


def _encoded(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise InvalidField(f"steps.text is {quoted(text)}, of which the tokenizer makes no token.", param="steps.text")
    return ids


def _in_text(mark: str, source: SentText, ids: Sequence[int], tokenizer: Any) -> list[int] | None:
    """The tokens with the last characters of `mark`, wherever the tokenizer has cut around it. None where the tokenizer
    does not tell which characters a token has, or more was cut away of the ids than their beginning."""
    if not tokenizer.is_fast:
        return None
    told = tokenizer(source.text, add_special_tokens=source.special, return_offsets_mapping=True)
    cut = len(told["input_ids"]) - len(ids)
    if cut < 0 or told["input_ids"][cut:] != list(ids):
        return None
    # Tokens that the template puts around a text have no characters.
    spans = [(begin, at) for at, (begin, end) in enumerate(told["offset_mapping"]) if end > begin]
    begins = [begin for begin, _ in spans]
    last = [bisect_left(begins, match.end()) - 1 for match in re.finditer(re.escape(mark), source.text)]
    places = {spans[at][1] - cut for at in last if at >= 0}
    return sorted(place for place in places if place >= 0)


def _ends(ids: tuple[int, ...], mark: tuple[int, ...]) -> list[int]:
    """The last token of every occurrence of `mark`."""
    length, last = len(mark), mark[-1]
    return [at for at, token in enumerate(ids) if token == last and ids[max(0, at - length + 1) : at + 1] == mark]


def _refuse_hidden(mark: str, found: int, ids: Sequence[int], index: int, tokenizer: Any) -> None:
    """Raises `InvalidField` where the text of `ids` has the mark more often than they have its tokens."""
    there = str(tokenizer.decode(list(ids))).count(mark)
    if there > found:
        raise InvalidField(
            f"steps.text {quoted(mark)} is {counted(there, 'time')} in the text of sequence {index}, and "
            f"{counted(found, 'time')} as tokens of its own: elsewhere they have merged with what stands beside. Send "
            "the sequence as text, or say by steps.positions where its steps are.",
            param="steps.text",
        )


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
