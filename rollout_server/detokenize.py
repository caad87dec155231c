"""Token ids to text, a few ids at a time.

A character may span several tokens, and some decoders look at the token before (a leading space, a run of byte
tokens). So text is decided by decoding a short window twice: the tokens whose text is already out, and the same with
the new ones. What the second adds is new text, unless it ends inside a character: then it waits for the next token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes and a token at least one: the token that follows three more decides it.
LONGEST_CHARACTER = 4
# Bounds the window, and with it the work per token, when many ids are pushed at once.
CHUNK = 64


@lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that `decode(skip_special_tokens=True)` leaves out."""
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    # A fast tokenizer skips by the flag of the added token, which is not the same set as `all_special_ids`.
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


class IncrementalText:
    """The text of a growing token sequence, equal at the end to
    `tokenizer.decode(ids, skip_special_tokens=…, clean_up_tokenization_spaces=False)`.

    Never gives U+FFFD for a character whose remaining bytes may still come. Work per token is bounded. One exception
    to equality: where a byte-fallback tokenizer (Llama 2) meets an invalid byte right after valid byte tokens, its
    `decode` turns the valid ones into U+FFFD as well; here they stay what they were.
    """

    __slots__ = ("_length", "_parts", "_read", "_skip", "_tokenizer", "_window")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """`shown` are special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._skip = special_ids(tokenizer) - shown if skip_special_tokens else frozenset()
        self._window: list[int] = []
        # How many ids of the window have their text out already; they are kept as context for the next ones.
        self._read = 0
        self._parts: list[str] = []
        self._length = 0

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
        """Whether the last tokens wait for the rest of a character."""
        return self._read < len(self._window)

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
        fresh = [id for id in ids if id not in self._skip]
        return "".join([self._advance(fresh[at : at + CHUNK]) for at in range(0, len(fresh), CHUNK)])

    def finish(self) -> str:
        """No more ids will come: returns what was held back, an incomplete character as U+FFFD. Idempotent."""
        if not self.pending:
            return ""
        return self._take(len(self._window), self._decode(self._window), self._decode(self._window[: self._read]))

    def _advance(self, ids: Sequence[int]) -> str:
        self._window += ids
        end = len(self._window)
        before = self._decode(self._window[: self._read])
        whole = self._decode(self._window)
        if whole == before and before:
            # Tokens without text would only make the window longer.
            del self._window[self._read :]
            return ""
        # Newest boundary first; a single id was judged at the older ones when it was the newest.
        for cut in range(end, max(self._read, end - (LONGEST_CHARACTER if len(ids) > 1 else 1)), -1):
            text = whole if cut == end else self._decode(self._window[:cut])
            # At the start a token may have no text and still be context (a lone space mark).
            if not text.endswith(REPLACEMENT) and (len(text) > len(before) or not before):
                return self._take(cut, text, before)
        if end - self._read < LONGEST_CHARACTER:
            return ""
        return self._give_up(whole, before)

    def _give_up(self, whole: str, before: str) -> str:
        """Bytes that can never become a character: all but the last U+FFFD of `whole` are final."""
        end = len(self._window)
        for cut in range(end - 1, max(self._read, end - LONGEST_CHARACTER), -1):
            text = self._decode(self._window[:cut])
            if len(before) < len(text) < len(whole) and whole.startswith(text):
                return self._take(cut, text, before)
        return self._take(end, whole, before) if end - self._read >= CHUNK else ""

    def _take(self, cut: int, text: str, before: str) -> str:
        """Puts out what `text` (the decoded window up to `cut`) adds to `before`; keeps its ids as the next context."""
        if text.startswith(before):
            new = text[len(before) :]
        else:  # a byte run went invalid and changed text that is already out
            new = self._decode(self._window[self._read : cut])
        self._window = self._window[self._read :]
        self._read = cut - self._read
        if new:
            self._parts.append(new)
            self._length += len(new)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        # Specials were left out already, so that they cannot fill the window.
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)
