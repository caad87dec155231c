"""The text that each token writes, as grammars read it: the one that a reply shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer

from rollout_server.text.detokenize import special_ids
from rollout_server.text.token_texts import REPLACEMENT

LARK = re.compile(
    r"""(?P<other>"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|(?://|\#)[^\n]*)|(?P<name><[^\s<>"]+>)""", re.VERBOSE
)
"""Strings, regexes and comments of Lark, and what names a token outside of them."""


@dataclass(frozen=True)
class Spelling:
    """A vocabulary for llguidance. Any tokens that write a text may be used for it. A token that a reply leaves out
    (special ones, the ends) stands for no text: a grammar can only name it."""

    tokens: Sequence[bytes]
    silent: frozenset[int]
    names: Mapping[str, int]
    """Tokens of the form <…> that write this name, such as marks of reasoning. They are text where a grammar spells one
    of them. In the free text of any other they would begin reasoning or end a call: there they are silent."""
    eos: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> Spelling:
        """`tokenizer` is transformers'. About a second for a large vocabulary. Raises ValueError and AttributeError
        where llguidance cannot read it."""
        read = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos))
        # llguidance takes added tokens for what their name says and those like <…> for silent, and both may be wrong.
        texts = _texts_of_added(tokenizer, silent=special_ids(tokenizer) | set(eos))
        silent = {id for id in range(vocabulary) if read.is_special_token(id)} | set(eos)
        silent = (silent - texts.keys()) | {id for id, text in texts.items() if text is None}
        tokens = [read.decode_bytes([id]) for id in range(vocabulary)]
        for id, text in texts.items():
            if text is not None:
                tokens[id] = text.encode()
        named = {text: id for id, text in texts.items() if text is not None and text[:1] + text[-1:] == "<>"}
        return cls(tokens, frozenset(silent), named, tuple(eos))

    def tokenizer_for(self, grammar: str) -> LLTokenizer:
        """For a grammar of this text, whose escapes are backslashes in any language."""
        bare = grammar.replace("\\", "")
        return self._spelt if any(name in bare for name in self.names) else self._plain

    @cached_property
    def _plain(self) -> LLTokenizer:
        return self._made(self.silent.union(self.names.values()))

    @cached_property
    def _spelt(self) -> LLTokenizer:
        return self._made(self.silent)

    def _made(self, silent: frozenset[int]) -> LLTokenizer:
        table = _Table(self.tokens, sorted(silent), self.eos[0])
        return LLTokenizer(TokenizerWrapper(table), n_vocab=len(self.tokens), eos_token=list(self.eos))

    def numbered(self, lark: str) -> str:
        """A grammar of Lark's in which `names` are numbers: llguidance knows only silent tokens by name."""

        def replaced(match: re.Match[str]) -> str:
            id = self.names.get(match["name"] or "")
            return match[0] if id is None else f"<[{id}]>"

        return LARK.sub(replaced, lark)


@dataclass(frozen=True, slots=True)
class _Table:
    """What `TokenizerWrapper` asks for."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError("Text that a grammar forces is not tokenized: rows sample it.")


def _texts_of_added(tokenizer: Any, *, silent: frozenset[int] | set[int]) -> dict[int, str | None]:
    """What added tokens write behind other text; None where that is nothing, or no text."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = _decoded(tokenizer, anchor)
    texts: dict[int, str | None] = {}
    for id in tokenizer.added_tokens_decoder:
        both = _decoded(tokenizer, [*anchor, id])
        text = both[len(before) :] if id not in silent and both.startswith(before) else ""
        texts[id] = text if text and REPLACEMENT not in text else None
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
