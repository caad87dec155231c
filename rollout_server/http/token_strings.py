"""Single tokens as strings, the same wherever the token stands, as the OpenAI completions route reports them."""

from __future__ import annotations

import re
from typing import Any

from rollout_server.detokenize import REPLACEMENT, special_ids

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

PART_OF_A_CHARACTER = "bytes:"


def _written(raw: bytes) -> str:
    return PART_OF_A_CHARACTER + "".join(f"\\x{byte:02x}" for byte in raw)


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE vocabularies (GPT-2): printable Latin-1 stands for itself, the other bytes
    for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


class TokenStrings:
    """Caches the string of every id it is asked for. A token that is only part of a character is written
    `bytes:\\xe2\\x82`, as OpenAI does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._alphabet = byte_level_alphabet()
        self._known: dict[int, str] = {}
        # A token is decoded behind another one, or decoders that trim the start would lose its leading space.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self._decode(self._anchor)

    def __getitem__(self, id: int) -> str:
        known = self._known.get(id)
        if known is None:
            known = self._known[id] = self._string(id)
        return known

    def utf8(self, id: int) -> bytes:
        """The token's part of the text as bytes, which need not be whole characters."""
        string = self[id]
        if not string.startswith(PART_OF_A_CHARACTER):
            return string.encode()
        # A token's own text may begin like this too.
        raw = self._bytes(str(self._tokenizer.convert_ids_to_tokens(id)))
        return string.encode() if raw is None or _written(raw) != string else raw

    def _string(self, id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(id)
        if token is None:  # a row of the head beyond the tokenizer's vocabulary
            return f"token_id:{id}"
        if id in self._special:
            return str(token)
        text = self._decode([*self._anchor, id])
        text = text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode([id])
        if REPLACEMENT not in text:
            return text
        raw = self._bytes(str(token))
        if raw is None:
            return text
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return _written(raw)

    def _bytes(self, token: str) -> bytes | None:
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        return None

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
