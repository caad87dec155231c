"""Token ids to text, a few ids at a time, the same text however they are dealt out.

A character may span several tokens, so text is decided byte by byte: whole characters are out at once, an incomplete
one waits for its next byte. What came out never changes. A text that goes on behind a prompt is read behind it: no
decoder then takes its first space for the start of a text, and a character that the prompt began is completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from rollout_server.rollout import RolloutRequest
from rollout_server.text.token_texts import REPLACEMENT, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A UTF-8 character has at most four bytes.
LONGEST_CHARACTER = 4
PART = 256
"""Characters of a text that are kept as one string, at least: `tail` then looks at few, and little is copied."""
ENDS_EARLY = "unexpected end of data"
"""Python's words for bytes that are right as far as they go."""


@lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that `decode(skip_special_tokens=True)` leaves out."""
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    # A fast tokenizer skips by the flag of the added token, which is not the same set as `all_special_ids`.
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


class IncrementalText:
    """The text of a growing token sequence, equal at the end to
    `tokenizer.decode(ids, skip_special_tokens=…, clean_up_tokenization_spaces=False)`, behind a context to what that
    adds to the context's.

    Never gives U+FFFD for a character whose remaining bytes may still come. Work per token is bounded. One exception
    to equality: where a byte-fallback tokenizer (Llama 2) meets an invalid byte among valid byte tokens, its `decode`
    turns the valid ones into U+FFFD as well; here they stay what they are.
    """

    __slots__ = ("_bytes", "_length", "_open", "_parts", "_previous", "_skip", "_texts", "opened", "starts")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        """`shown` are special tokens that are not skipped. `context` are the ids before the first, whose text is not
        part of this one, except for a character that they leave incomplete: that one stands here."""
        self._texts = texts_of(tokenizer)
        self._skip = special_ids(tokenizer) - shown if skip_special_tokens else frozenset()
        self._parts: list[str] = []
        self._length = 0
        # Bytes of an incomplete character, and where in them those tokens begin whose place in the text is not known.
        self._bytes = b""
        self._open: list[int] = []
        self.starts: list[int] = []
        """Where in the text each id begins, in characters, as far as that is decided. One that goes on with a character
        begins where that does. First come the `opened`, then what was pushed."""
        self._previous: int | None = None
        self._read_context(context)
        self.opened = len(self._open)
        """How many ids of the context begin within the character that it leaves incomplete."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, request: RolloutRequest) -> IncrementalText:
        """The text of a row of this request, as everything that looks at it must read it."""
        return cls(tokenizer, shown=request.shown, context=request.prompt_ids if request.continues else ())

    @property
    def text(self) -> str:
        """All text decided so far. Joins lazily; in a loop prefer what `push` returns, `length` and `tail`."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def length(self) -> int:
        """Characters decided so far."""
        return self._length

    @property
    def pending(self) -> bool:
        """True if the last tokens wait for the rest of a character."""
        return bool(self._bytes)

    def tail(self, characters: int) -> str:
        """The last `characters` of the text (all of it if shorter), without joining the rest."""
        parts: list[str] = []
        missing = characters
        for part in reversed(self._parts):
            if missing <= 0:
                break
            parts.append(part[-missing:])
            missing -= len(part)
        return "".join(reversed(parts))

    def push(self, ids: Iterable[int]) -> str:
        """Adds ids; returns the text they decide, which may be empty."""
        before = self._length
        for id in ids:
            if id in self._skip:
                self._put("")
            else:
                self._add(id)
        return self.tail(self._length - before)

    def finish(self) -> str:
        """No more ids will come: returns what was held back, an incomplete character as U+FFFD. Idempotent."""
        before = self._length
        self._decide(final=True)
        return self.tail(self._length - before)

    def whole(self, ids: Sequence[int], *, shown: frozenset[int]) -> str:
        """The text once all ids were pushed, which are the only ones; `shown` as at the start."""
        if not self._bytes and shown.isdisjoint(ids):
            at_once = self._texts.at_once(ids, behind=self._previous is not None)
            if at_once is not None:
                return at_once
        self.push(ids)
        self.finish()
        return self.text

    def _read_context(self, ids: Sequence[int]) -> None:
        """Only its end can matter: all before whole characters, or before so many bytes, is complete or broken."""
        first, size = len(ids), 0
        while first and size < LONGEST_CHARACTER:
            first -= 1
            found = self._texts.of(ids[first - 1] if first else None, ids[first])
            size += LONGEST_CHARACTER if found and isinstance(found, str) else len(found)
        self._previous = ids[first - 1] if first else None
        for id in ids[first:]:
            self._add(id)
        self._parts.clear()
        self.starts.clear()
        self._length = 0

    def _add(self, id: int) -> None:
        self._put(self._texts.of(self._previous, id))
        self._previous = id

    def _put(self, new: str | bytes) -> None:
        """What a token adds: text as it is, unless a character is open."""
        if isinstance(new, str) and not self._bytes:
            self.starts.append(self._length)
            self._tell(new)
            return
        self._open.append(len(self._bytes))
        self._bytes += new.encode() if isinstance(new, str) else new
        self._decide(final=False)

    def _decide(self, *, final: bool) -> None:
        told: list[str] = []
        at = 0
        for character, size in _characters(self._bytes, each_byte=self._texts.each_byte, final=final):
            at += size
            self._place(at, len(told))
            told.append(character)
        self._bytes = self._bytes[at:]
        self._open = [place - at for place in self._open]
        if not self._bytes:
            # Tokens without text behind the last character.
            self._place(1, len(told))
        self._tell("".join(told))

    def _place(self, end: int, character: int) -> None:
        """Tokens that begin before byte `end`, and not in an earlier character, begin with this new one."""
        while self._open and self._open[0] < end:
            self.starts.append(self._length + character)
            del self._open[0]

    def _tell(self, text: str) -> None:
        if self._parts and len(self._parts[-1]) < PART:
            self._parts[-1] += text
        else:
            self._parts.append(text)
        self._length += len(text)


def whole_text(tokenizer: PreTrainedTokenizerBase, request: RolloutRequest, ids: Sequence[int]) -> str:
    """What `IncrementalText.of` comes to when all `ids` of a row were pushed: by one call of the tokenizer, which takes
    a sixth of the time, wherever that is bound to say the same."""
    found = IncrementalText.of(tokenizer, request)
    return found.whole(ids, shown=request.shown)


def _characters(raw: bytes, *, each_byte: bool, final: bool) -> Iterator[tuple[str, int]]:
    """The characters that are decided, with the number of bytes of each. An incomplete one is left out, unless these
    are the `final` bytes. Bytes that are none become U+FFFD, each or as many as could have begun a character."""
    while raw:
        whole, broken = raw, 0
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            whole, broken = raw[: error.start], error.end - error.start
            text = whole.decode()
            if error.reason == ENDS_EARLY and not final:
                raw, broken = whole, 0
        for character in text:
            yield character, len(character.encode())
        if broken:
            yield from [(REPLACEMENT, 1)] * broken if each_byte else [(REPLACEMENT, broken)]
        raw = raw[len(whole) + broken :]
