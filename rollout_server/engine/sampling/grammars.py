"""Grammars made ready by llguidance: which tokens may come next in the text of a row.

A grammar is compiled once for the model's tokenizer, on whatever thread asks, and kept; each row follows a copy of its
own. What a compilation and a step may take is bounded by llguidance's limits, which count work and not seconds.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, grammar_from
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from rollout_server.engine.sampling.spelling import Spelling
from rollout_server.errors import InvalidField, UnsupportedField
from rollout_server.grammar import WHITESPACE, Follower, Grammar, GrammarKind
from rollout_server.quoting import shortened

MOST_TEXT = 262_144
"""Characters of a grammar."""
MOST_KEPT = 256
"""Compiled grammars."""
MOST_LEXER_STATES = 50_000
"""One to two kB each."""
UNFORCED = '\n%llguidance {"no_forcing": true}\n'
"""Else text that has to come is tokenized as the model's tokenizer would, and its tokens come alone. But a tokenizer
may make other text of it: it takes the names of special tokens for these tokens, which a reply does not show, it
composes accents, trims spaces. The last such line of a grammar counts, and it counts for what is nested in it."""
MESSAGE_SHOWN = 240
EXCERPT = re.compile(r"\s*\d+ \| ")


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """The `grammar.Constraint` of this engine. Two of one grammar are equal."""

    grammar: Grammar
    start: LLMatcher = field(compare=False, repr=False)
    """At its beginning; only copied, never moved on."""

    def accepted(self, token_ids: Sequence[int]) -> int:
        follower, free = self.follow(()), 0
        while follower.free and free < len(token_ids):
            follower.advance(token_ids[free])
            free += 1
        return free + follower.matcher.try_consume_tokens(list(token_ids[free:]))

    def follow(self, token_ids: Sequence[int]) -> GrammarFollower:
        """The follower of a row that begins with these tokens."""
        follower = GrammarFollower(self.start.deep_copy(), self.grammar.after)
        for token in token_ids:
            follower.advance(token)
        return follower


class GrammarFollower:
    """Where a row is in its grammar."""

    __slots__ = ("_mark", "_tail", "fault", "matcher")

    def __init__(self, matcher: LLMatcher, mark: tuple[int, ...] = ()) -> None:
        self._mark = mark
        self._tail: tuple[int, ...] = ()
        self.matcher = matcher
        self.fault: str | None = None
        """Why it cannot be followed any further."""

    def advance(self, token: int) -> None:
        """Takes the row's next token."""
        if self.free:
            self._tail = (*self._tail, token)[-len(self._mark) :]
        else:
            self.matcher.consume_token(token)
            self.check()

    @property
    def may_end(self) -> bool:
        """True if the text so far is one of the grammar's."""
        return not self.free and self.matcher.is_accepting()

    @property
    def free(self) -> bool:
        """Anything may come: the grammar has not begun."""
        return self._tail != self._mark

    def check(self) -> None:
        """Notes a fault: each call of the library may have met a limit."""
        if self.fault is None and self.matcher.is_error():
            self.fault = said(self.matcher.get_error())


class Grammars:
    """Compiles and keeps; its methods may be called from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Iterable[int]) -> None:
        self._hugging_face = tokenizer
        self._vocabulary = vocabulary
        self._eos = sorted(eos)
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._keeping = threading.Lock()
        # One at a time: however many are asked for, other cores stay free.
        self._compiling = threading.Lock()

    def compile(self, grammar: Grammar, param: str) -> CompiledGrammar:
        """Raises `InvalidField` about the field `param` for what is no grammar or too large a one, and
        `UnsupportedField` where the model's tokenizer cannot be used."""
        if (kept := self._find(grammar)) is not None:
            return kept
        if len(grammar.text) > MOST_TEXT:
            raise InvalidField(
                f"{param} has {len(grammar.text)} characters; at most {MOST_TEXT} are read.", param=param
            )
        with self._compiling:
            if (kept := self._find(grammar)) is not None:
                return kept
            compiled = CompiledGrammar(grammar, self._matcher(grammar, param))
        with self._keeping:
            self._kept[grammar] = compiled
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _find(self, grammar: Grammar) -> CompiledGrammar | None:
        with self._keeping:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _matcher(self, grammar: Grammar, param: str) -> LLMatcher:
        if not self._eos:
            raise UnsupportedField(f"{param} needs a model with an end token; this one has none.", param=param)
        spelling = self._spelling(param)
        try:
            tokenizer = spelling.tokenizer_for(grammar.text)
            matcher = LLMatcher(tokenizer, written(grammar, spelling), log_level=0, limits=_limits())
        except ValueError as error:
            raise InvalidField(f"{param} cannot be compiled: {said(str(error))}.", param=param) from error
        # The first mask too: some grammars compile, but nothing can begin them.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidField(f"{param} cannot be compiled: {said(matcher.get_error())}.", param=param)
        return matcher

    def _spelling(self, param: str) -> Spelling:
        try:
            return self._made
        except (ValueError, AttributeError) as error:
            raise UnsupportedField(
                f"{param} is not supported with this model's tokenizer: {said(str(error))}.", param=param
            ) from error

    @cached_property
    def _made(self) -> Spelling:
        """Not before it is needed."""
        return Spelling.of(self._hugging_face, self._vocabulary, self._eos)


def _limits() -> LLParserLimits:
    return LLParserLimits(max_lexer_states=MOST_LEXER_STATES, verbose_errors=False)


def written(grammar: Grammar, spelling: Spelling) -> str:
    """The grammar in llguidance's own form. Raises ValueError."""
    match grammar.kind:
        case GrammarKind.REGEX:
            (regex,) = json.loads(LLMatcher.grammar_from_regex(grammar.text))["grammars"]
            return str(regex["lark_grammar"]) + UNFORCED
        case GrammarKind.CHOICE:
            return grammar_from("choice", grammar.text) + UNFORCED
        case GrammarKind.GRAMMAR:
            return spelling.numbered(grammar_from("grammar", grammar.text)) + UNFORCED
    top = json.loads(
        LLMatcher.grammar_from_json_schema(
            grammar.text,
            # A pattern that only the empty text matches would be another thing to the library.
            overrides={"whitespace_flexible": False}
            if grammar.whitespace == ""
            else {"whitespace_pattern": grammar.whitespace or WHITESPACE},
        )
    )
    (schema,) = top["grammars"]
    return json.dumps({"grammars": [{"lark_grammar": "start: @text" + UNFORCED}, {**schema, "name": "text"}]})


def said(message: str) -> str:
    """The library's words on one line, without its drawings of where in the text something is."""
    told = []
    for line in message.split("<non-verbose/>")[0].splitlines():
        if EXCERPT.match(line):
            break
        if line.strip("^ "):
            told.append(line.strip())
    return shortened(" ".join(told).rstrip(". "), MESSAGE_SHOWN) or "it cannot be followed"


class MaskFiller:
    """Computes masks of many rows at once, outside of Python's lock."""

    def __init__(self, vocabulary: int) -> None:
        self._words = (vocabulary + 31) // 32

    def fill(self, followers: Sequence[Follower]) -> np.ndarray:
        """uint32 [len(followers), ⌈V/32⌉]: token t may come where bit t mod 32 of word t // 32 is set. A follower that
        meets a limit gets a fault."""
        words = np.full((len(followers), self._words), -1, dtype=np.int32)
        rows = [(follower.matcher, row) for row, follower in enumerate(followers) if not follower.free]
        if len(rows) == 1:
            ((matcher, row),) = rows
            fill_next_token_bitmask(matcher, words, row)
        elif rows:
            fill_next_token_bitmask_par(self._executor, rows, words)
        for follower in followers:
            follower.check()
        return words.view(np.uint32)

    @cached_property
    def _executor(self) -> LLExecutor:
        """Its threads are not started before rows need them."""
        return LLExecutor()


def hold_back(words: np.ndarray, tokens: Iterable[int]) -> None:
    """Clears the bits of tokens in a row's mask [W], unless nothing else may come: the grammar's end goes before
    `min_tokens`."""
    held = words.copy()
    for token in tokens:
        held[token // 32] &= ~np.uint32(1 << token % 32)
    if held.any():
        words[:] = held
