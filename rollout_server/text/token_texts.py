"""What each token adds to a text, whatever the tokenizer: a string, or bytes where it holds a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BYTE_FALLBACK = "ByteFallback"
LOOK_NO_FURTHER = frozenset(
    {"ByteLevel", BYTE_FALLBACK, "Metaspace", "Replace", "Fuse", "Strip", "WordPiece", "Sequence"}
)
"""Decoders to which a token's neighbours say nothing, but for the start of a text. Others see the token before."""
MOST_PAIRS = 65_536
"""How many texts are remembered of decoders that look at the token before."""


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE vocabularies (GPT-2): printable Latin-1 stands for itself, the other bytes
    for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


class TokenTexts:
    """Asks the tokenizer once for each token and remembers: what costs a look-up a token may be done for every token
    of every row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alphabet = byte_level_alphabet()
        kinds = decoder_kinds(tokenizer)
        self._alone = kinds is not None and kinds <= LOOK_NO_FURTHER
        self.each_byte = kinds is None or BYTE_FALLBACK in kinds
        """True if every byte of a broken character becomes a U+FFFD of its own, as with byte-fallback; else there is
        one for all that could still have become a character."""
        self._first: dict[int, str | bytes] = {}
        self._behind: dict[int, str | bytes] = {}
        self._pairs: dict[tuple[int, int], str | bytes] = {}

    def of(self, previous: int | None, id: int) -> str | bytes:
        """What `id` adds behind `previous`; None: nothing stands before it, where some decoders trim a space."""
        if previous is None:
            if id not in self._first:
                self._first[id] = self._read([], id)
            return self._first[id]
        if self._alone:
            return self.behind(id)
        if (previous, id) not in self._pairs:
            if len(self._pairs) >= MOST_PAIRS:
                self._pairs.clear()
            self._pairs[previous, id] = self._read([*self._anchor, previous], id)
        return self._pairs[previous, id]

    def behind(self, id: int) -> str | bytes:
        """What `id` adds behind an ordinary token."""
        known = self._behind.get(id)
        if known is None:
            known = self._behind[id] = self._read(self._anchor, id)
        return known

    def at_once(self, ids: Sequence[int], *, behind: bool) -> str | None:
        """What all `ids` add but for special tokens, at the start of a text or `behind` an ordinary token. None where
        one call of the tokenizer may say something else than what each of them adds."""
        if not self._alone:
            return None
        before = self._anchor if behind else []
        text = str(
            self._tokenizer.decode([*before, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        shown = self._decode(before)
        # A byte-fallback decoder takes a broken byte for a reason to break its neighbours too.
        if not text.startswith(shown) or (self.each_byte and REPLACEMENT in text):
            return None
        return text[len(shown) :]

    @cached_property
    def _anchor(self) -> list[int]:
        """An ordinary token to decode others behind, so that no decoder takes them for the start of a text."""
        found = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        everything = ([id] for id in range(len(self._tokenizer)))
        return next((ids for ids in (found, *everything) if ids and self._serves(self._decode(ids))), [])

    @staticmethod
    def _serves(text: str) -> bool:
        return bool(text.strip()) and REPLACEMENT not in text

    def _read(self, before: list[int], id: int) -> str | bytes:
        shown, text = self._decode(before), self._decode([*before, id])
        text = text[len(shown) :] if text.startswith(shown) else self._decode([id])
        if REPLACEMENT not in text:
            return text
        raw = self.raw(id)
        if raw is None:
            return text
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def raw(self, id: int) -> bytes | None:
        """The bytes that the token stands for, where its name spells them."""
        token = str(self._tokenizer.convert_ids_to_tokens(id))
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        return None

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=8)
def texts_of(tokenizer: PreTrainedTokenizerBase) -> TokenTexts:
    """One for all that read this tokenizer's tokens."""
    return TokenTexts(tokenizer)


def decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> frozenset[str] | None:
    """The parts a fast tokenizer's decoder is made of, none if it just joins tokens; None for one written in Python."""
    if not tokenizer.is_fast:
        return None
    decoder: Any = tokenizer.backend_tokenizer.decoder
    written = MappingProxyType({}) if decoder is None else json.loads(decoder.__getstate__())
    return frozenset(_kinds(written))


def _kinds(written: Mapping[str, Any]) -> Iterator[str]:
    if "type" in written:
        yield written["type"]
    for part in written.get("decoders", ()):
        yield from _kinds(part)
