"""What the text of a row has to match. Standard library only, like the other nouns (`rollout`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""The usual white space between the parts of JSON. It is bounded, since models have been seen to write newlines for
ever."""


class GrammarKind(StrEnum):
    """How a grammar is written; the names are vLLM's."""

    JSON = "json"
    """A JSON schema, as JSON."""
    REGEX = "regex"
    CHOICE = "choice"
    """A JSON list of texts; the row writes one of them."""
    GRAMMAR = "grammar"
    """GBNF, or Lark as llguidance reads it."""


@dataclass(frozen=True, slots=True)
class Grammar:
    kind: GrammarKind
    text: str
    whitespace: str | None = None
    """For JSON, a regex of what may stand between its parts; empty for nothing, None for the usual."""
    after: tuple[int, ...] = ()
    """Token ids of the mark, the end of reasoning, behind which it begins; what stands before is free."""

    @property
    def is_content(self) -> bool:
        """True if what it describes has no parts: JSON and choices may spell marks of reasoning and of calls, which
        are text there; the others may write a whole turn."""
        return self.kind in (GrammarKind.JSON, GrammarKind.CHOICE)


class Follower(Protocol):
    """Where a row is in its grammar."""

    fault: str | None
    """Why it cannot be followed any further."""
    matcher: Any
    """What masks are filled from; only who compiles grammars looks into it."""

    @property
    def free(self) -> bool:
        """Anything may come: the grammar has not begun."""

    def advance(self, token: int) -> None:
        """Takes the row's next token."""

    @property
    def may_end(self) -> bool:
        """True if the text so far is one of the grammar's."""

    def check(self) -> None:
        """Notes a fault."""


@runtime_checkable
class Constraint(Protocol):
    """A grammar made ready for one tokenizer. Immutable, so threads share it."""

    @property
    def grammar(self) -> Grammar: ...

    def follow(self, token_ids: Sequence[int]) -> Follower:
        """Where a row is that begins with these tokens."""

    def accepted(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens, from the first on, can begin a text of the grammar. An end token
        counts only where the text could also go on."""
