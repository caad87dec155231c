"""Single tokens as strings, the same wherever the token stands, as the OpenAI completions route reports them."""

from __future__ import annotations

from typing import Any

from rollout_server.text.detokenize import special_ids
from rollout_server.text.token_texts import texts_of

PART_OF_A_CHARACTER = "bytes:"


def _written(raw: bytes) -> str:
    return PART_OF_A_CHARACTER + "".join(f"\\x{byte:02x}" for byte in raw)


class TokenStrings:
    """Caches the string of every id it is asked for. A token that is only part of a character is written
    `bytes:\\xe2\\x82`, as OpenAI does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._texts = texts_of(tokenizer)
        self._known: dict[int, str] = {}

    def __getitem__(self, id: int) -> str:
        known = self._known.get(id)
        if known is None:
            known = self._known[id] = self._string(id)
        return known

    def utf8(self, id: int) -> bytes:
        """The token's part of the text as bytes, which need not be whole characters."""
        if id not in self._special and isinstance(text := self._texts.behind(id), bytes):
            return text
        return self[id].encode()

    def _string(self, id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(id)
        if token is None:  # a row of the head beyond the tokenizer's vocabulary
            return f"token_id:{id}"
        if id in self._special:
            return str(token)
        text = self._texts.behind(id)
        return text if isinstance(text, str) else _written(text)
