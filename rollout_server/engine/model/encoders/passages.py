"""What is read: tokens with their types, and which of them share a forward. Plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.errors import ContextExceeded, InvalidField

STEP = 8
"""Widths are multiples of it."""
STEPS_AN_OCTAVE = 4
"""Length buckets between a width and twice that width: beyond 32 tokens less than a fifth of a row is padding."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One sequence, with whatever special tokens the tokenizer puts around it."""

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    """Token types, as many as ids; empty where all of them are 0."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an encoder takes."""

    vocabulary: int
    max_tokens: int
    token_types: int
    """How many kinds of tokens its table knows; 0 where it has none."""

    def check(self, passage: Passage, param: str) -> None:
        """Raises `InvalidField` or `ContextExceeded`, which names the field `param`."""
        if not passage.ids:
            raise InvalidField("A sequence has no tokens.", param=param)
        if len(passage.ids) > self.max_tokens:
            raise ContextExceeded(
                f"A sequence of {len(passage.ids)} tokens exceeds the {self.max_tokens} that this model reads: "
                "shorten it, or send truncate_prompt_tokens.",
                param=param,
            )
        strange = next((token for token in passage.ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise InvalidField(f"Token id {strange} is outside the vocabulary of {self.vocabulary}.", param=param)
        if passage.types and len(passage.types) != len(passage.ids):
            raise InvalidField(
                f"A sequence has {len(passage.ids)} tokens and {len(passage.types)} token types.", param=param
            )
        if any(not 0 <= kind < max(self.token_types, 1) for kind in passage.types):
            known = f"0 to {self.token_types - 1}" if self.token_types else "none"
            raise InvalidField(f"A token type is outside of those that this model has ({known}).", param=param)


def tokenised(tokenizer: Any, text: str, pair: str | None = None, *, token_types: int) -> Passage:
    """Tokenises a text, or a pair by the tokenizer's own template, special tokens included. Types are kept where the
    model has several and the tokenizer gives them: of most families it does not."""
    found = tokenizer(text, pair, add_special_tokens=True, truncation=False)
    types = tuple(found["token_type_ids"]) if token_types > 1 and "token_type_ids" in found else ()
    return Passage(tuple(found["input_ids"]), types if any(types) else ())


def width_of(length: int) -> int:
    """The length bucket: the width to which a sequence of this length may be padded."""
    octave = STEP * STEPS_AN_OCTAVE
    while octave * 2 < length:
        octave *= 2
    step = max(STEP, octave // STEPS_AN_OCTAVE) if length > octave else STEP
    return -(-length // step) * step


def groups(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, ...]]:
    """Indices of sequences that are read together, of similar length and with at most `budget` cells, padding included;
    one that is longer than the budget is read by itself. The longest come first, so that memory is known early."""
    found: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        width = width_of(lengths[found[0]]) if found else 0
        if found and (width_of(lengths[index]) != width or (len(found) + 1) * width > budget):
            yield tuple(found)
            found = []
        found.append(index)
    if found:
        yield tuple(found)
