"""One choice of an OpenAI reply: a row as these routes show it, in one piece or in pieces that add up to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout_server.engine.messages.rollouts import TokensSampled
from rollout_server.engine.messages.scoring import ScoredSequence
from rollout_server.engine.sampling.margins import margins
from rollout_server.http.replies.json_entries import error_entry, finite, rollout_text, span_entry
from rollout_server.http.requests.tokens.prompts import PromptTokens
from rollout_server.rollout import FinishReason, Rollout, RolloutRequest, SamplingParams
from rollout_server.schemas.openai.options import LogprobsMode
from rollout_server.text.detokenize import IncrementalText, special_ids
from rollout_server.text.stop_strings import RowText
from rollout_server.text.token_strings import TokenStrings

Top = Sequence[tuple[int, float]]
SEARCHED = 64
"""How many characters of a prompt are searched for a token that does not stand behind the one before."""
ALL = 1 - 1e-6
"""Probability above which nothing is left, in float32."""


@dataclass(slots=True)
class Piece:
    """What a choice gained: text, tokens, and at the end how it ended. The four last lists are of one length, empty
    unless log-probabilities were asked for: tokens of an echoed prompt stand in these only."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    rollout: dict[str, Any] | None = None

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.text + other.text,
            self.token_ids + other.token_ids,
            self.scored_ids + other.scored_ids,
            self.logprobs + other.logprobs,
            self.tops + other.tops,
            self.offsets + other.offsets,
            other.finish_reason,
            other.stop_reason,
            other.rollout,
        )

    def add(self, token: Token, offset: int) -> None:
        self.scored_ids.append(token.id)
        self.logprobs.append(None if token.logprob is None else finite(token.logprob))
        self.tops.append(token.top)
        self.offsets.append(offset)


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """What all choices of a request share."""

    tokenizer: Any
    strings: TokenStrings
    eos_token_ids: Sequence[int]
    top_logprobs: int | None
    """Alternatives of every token; None: no log-probabilities at all."""
    logprobs_mode: LogprobsMode
    include_stop: bool


@dataclass(frozen=True, slots=True)
class Token:
    """A token on its way into a piece."""

    id: int
    logprob: float | None
    top: Top
    sampled: bool = True
    """False for a token of an echoed prompt."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as it is repeated in front of the completion: its text and, if asked for, its log-probabilities. A
    character that it leaves incomplete stands in the completion's text, and so do the `opened` tokens within it."""

    piece: Piece
    opened: Sequence[Token] = ()

    @classmethod
    def of(cls, prompt: PromptTokens, scored: ScoredSequence | None, reading: ChoiceOptions) -> Echo:
        decoder = IncrementalText(reading.tokenizer, skip_special_tokens=False)
        decoder.push(prompt.ids)
        piece = Piece(text=decoder.text if prompt.text is None else prompt.text)
        if scored is None:
            return cls(piece)
        tops = scored.top_logprobs or (None,) * len(prompt.ids)
        tokens = [
            Token(id, value, top or (), sampled=False)
            for id, value, top in zip(prompt.ids, scored.logprobs, tops, strict=True)
        ]
        special = special_ids(reading.tokenizer)
        offsets = _offsets_in(piece.text, decoder, [token.id in special for token in tokens])
        for token, offset in zip(tokens, offsets, strict=False):
            piece.add(token, offset)
        return cls(piece, tokens[len(offsets) :])


def _offsets_in(text: str, decoder: IncrementalText, special: Sequence[bool]) -> list[int]:
    """Where the tokens of a decoded prompt, `special` ones or not, stand in the text that it came as. What the
    tokenizer put in front has no text there, and spaces or the case of letters may have been lost; a tokenizer that
    normalises otherwise may be off by what it changed."""
    decoded, starts = decoder.text, decoder.starts
    if decoded.endswith(text):
        return [max(start - (len(decoded) - len(text)), 0) for start in starts]
    found, place = [], 0
    for start, end, kind in zip(starts, [*starts[1:], len(decoded)], special, strict=False):
        begin, place = _place_in(text, place, decoded[start:end], special=kind)
        found.append(begin)
    return found


def _place_in(text: str, start: int, piece: str, *, special: bool) -> tuple[int, int]:
    """Where a token begins that stands at `start` or a little further on, and where the next one may."""
    ahead, piece = text[start : start + SEARCHED + len(piece)].lower(), piece.lower()
    if ahead.startswith(piece):
        return start, start + len(piece)
    word, words = piece.strip(), ahead.lstrip()
    at = len(ahead) - len(words) if words.startswith(word) else -1 if special else ahead.find(word)
    if not word or at < 0:
        return start, start
    return start + at, start + at + len(word)


class Choice:
    """Follows one row. `start` once, `push` for tokens as they come, `finish` with the row; the pieces add up. Each
    route writes them in its own way: `whole` in a reply, `part` in an event of a stream."""

    def __init__(self, index: int, reading: ChoiceOptions, request: RolloutRequest, echo: Echo | None) -> None:
        self.index = index
        self._reading = reading
        self._request = request
        self._echo = echo
        self._start = len(echo.piece.text) if echo else 0
        sampling = request.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(reading.eos_token_ids))
        self._text = RowText(IncrementalText.of(reading.tokenizer, request), stops=sampling.stop, ends=ends)
        self._taken = 0
        # Tokens of which it is not known where they begin: their character is incomplete, or a stop string may take
        # it back. The first of them is the text's `_released`th.
        self._waiting: list[Token] = list(echo.opened) if echo else []
        self._released = self._text.opened - len(self._waiting)

    def start(self) -> Piece:
        return self._echo.piece if self._echo else Piece()

    def push(self, event: TokensSampled) -> Piece:
        for at, id in enumerate(event.token_ids):
            top = event.top_logprobs[at] if event.top_logprobs else ()
            self._take(id, event.logprobs[at], event.sampling_logprobs[at], top)
        piece = Piece(text=self._text.ready())
        self._release(piece, self._text.sent, final=False)
        return piece

    def finish(self, rollout: Rollout) -> Piece:
        for at in range(self._taken, len(rollout.token_ids)):
            top = (rollout.top_logprobs[at] if rollout.top_logprobs else None) or ()
            self._take(rollout.token_ids[at], rollout.logprobs[at], rollout.sampling_logprobs[at], top)
        reading = self._reading
        whole = rollout_text(rollout, reading.tokenizer, self._request, include_stop=reading.include_stop)
        piece = self._end(whole, rollout.finish_reason, [span_entry(span) for span in rollout.spans])
        piece.stop_reason = rollout.stop_reason
        if piece.rollout is not None and rollout.error is not None:
            piece.rollout["error"] = error_entry(rollout.error)
        return piece

    def finish_unasked(self) -> Piece:
        """The end of a row of which no token was asked for: its prompt may have left text."""
        return self._end(self._text.finish(), FinishReason.LENGTH, [])

    def _end(self, whole: str, reason: FinishReason, versions: list[dict[str, Any]]) -> Piece:
        piece = Piece(text=self._text.rest(whole), finish_reason=reason)
        self._release(piece, len(whole), final=True)
        piece.rollout = {"versions": versions, "logprobs_mode": self._reading.logprobs_mode}
        return piece

    def _take(self, id: int, logprob: float, sampling_logprob: float, top: Top) -> None:
        self._taken += 1
        self._text.push(id)
        reading, value = self._reading, logprob
        if reading.top_logprobs is not None and reading.logprobs_mode == "processed_logprobs":
            value, sampling = sampling_logprob, self._request.sampling
            top = processed_top(top, logprob=logprob, sampling_logprob=sampling_logprob, sampling=sampling)
        self._waiting.append(Token(id, value, top[: reading.top_logprobs]))

    def _release(self, piece: Piece, sent: int, *, final: bool) -> None:
        """Hands out the tokens that begin within the first `sent` characters. At the end it hands out all: those that
        were cut off begin there."""
        begins = self._text.begins
        ready = 0
        for at, token in enumerate(self._waiting, self._released):
            offset = begins[at] if at < len(begins) else self._text.length
            if not final and (at >= len(begins) or offset > sent):
                break
            ready += 1
            if token.sampled:
                piece.token_ids.append(token.id)
            if self._reading.top_logprobs is not None:
                piece.add(token, self._start + min(offset, sent))
        del self._waiting[:ready]
        self._released += ready

    def begins_within(self, stretches: Sequence[tuple[int, int]]) -> int:
        """How many of its tokens begin in these stretches of its text, each from and to."""
        begins = self._text.begins[self._text.opened :]
        return sum(any(first <= begin < end for first, end in stretches) for begin in begins)

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of a reply, from all its pieces."""
        raise NotImplementedError

    def part(self, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        """The choice of an event; None if the piece holds nothing that is news to the client."""
        raise NotImplementedError

    def told(self, piece: Piece, *, token_ids: bool) -> bool:
        """Returns whether the piece holds tokens, for a client that asked for them."""
        return bool(piece.token_ids) and (token_ids or self._reading.top_logprobs is not None)


def processed_top(
    top: Sequence[tuple[int, float]], *, logprob: float, sampling_logprob: float, sampling: SamplingParams
) -> list[tuple[int, float]]:
    """(id, log-probability) under temperature and filters, best first, without the tokens that the filters removed.

    `top` are the most probable of the unmodified distribution; `logprob` and `sampling_logprob` are the sampled
    token's, whose difference is the normaliser. Every filter keeps a prefix of the ranking. It ends where `margins`
    says so, or where what is kept sums to one: only that tells of a filter that needs the whole vocabulary. A greedy
    row leaves one token, of probability one.
    """
    if sampling.temperature == 0:
        return [(id, 0.0) for id, _ in top[:1]]
    processed = np.array([value for _, value in top]) / sampling.temperature + (
        sampling_logprob - logprob / sampling.temperature
    )
    if sampling.filtered and len(top):
        weights = np.exp(processed)
        stays = (margins(weights, sampling, whole=False) >= 0) & (np.cumsum(weights) - weights < ALL)
        processed = processed[: np.count_nonzero(stays)]
    return [(id, value) for (id, _), value in zip(top, processed.tolist(), strict=False)]
