"""Texts far beyond what fits, refused before they are read to their end: a few megabytes take seconds to tokenize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.quoting import counted

PIECE = 16_384
"""Characters of one piece. A text of as many is cheap to tokenize."""
SEAM = 8
"""How many tokens more a text may have because it was cut."""
DOUBLE = 2
"""However a tokenizer shortens what it reads, by normalising it or by joining across the cuts, it does so within pieces
of this size too, nearly as much: with this many times what fits, the whole does not fit either."""


class Bound(Protocol):
    """Limits the prompts that a route takes."""

    def check(self, tokenizer: Any, text: str, param: str) -> None:
        """Raises where the text is too long, whatever its tokens."""

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises where there are too many."""


@dataclass(frozen=True, slots=True)
class ContextBound:
    """A prompt has to fit: `tokens` are what the context holds."""

    tokens: int
    go_on: Callable[[], None] | None = None
    """Raises where there is no need to read any further texts, see `leaving`."""

    def check(self, tokenizer: Any, text: str, param: str) -> None:
        if self.go_on is not None:
            self.go_on()
        if len(text) <= PIECE:
            return
        count = 0
        for at in range(0, len(text), PIECE):
            count += len(tokenizer.encode(text[at : at + PIECE], add_special_tokens=False)) - SEAM
            if count > DOUBLE * self.tokens:
                raise ContextExceeded(
                    f"{param} has {len(text)} characters, which are more than {DOUBLE * self.tokens} tokens; the "
                    f"context holds {self.tokens}.",
                    param=param,
                )

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        if len(ids) > self.tokens:
            raise ContextExceeded(
                f"{param} has {counted(len(ids), 'token')}; the context holds {self.tokens}.", param=param
            )


@dataclass(frozen=True, slots=True)
class CharacterBound:
    """For a text that is only counted, and need not fit."""

    characters: int

    def check(self, tokenizer: Any, text: str, param: str) -> None:
        if len(text) > self.characters:
            raise InvalidField(
                f"{param} has {len(text)} characters; at most {self.characters} are tokenized in one request. Send it "
                "in parts.",
                param=param,
            )

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Accepts any number of ids."""
