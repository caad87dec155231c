"""One choice of an OpenAI reply: a row as these routes show it, in one piece or in pieces that add up to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout_server.detokenize import IncrementalText
from rollout_server.engine.messages import ScoredSequence, TokensSampled
from rollout_server.http.encoding import error_entry, finite, rollout_text, span_entry
from rollout_server.http.processed import processed_top
from rollout_server.http.prompts import PromptTokens
from rollout_server.http.row_text import RowText
from rollout_server.http.token_strings import TokenStrings
from rollout_server.rollout import Rollout, SamplingParams
from rollout_server.schemas.openai import LogprobsMode

Top = Sequence[tuple[int, float]]


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

    def add(self, id: int, logprob: float | None, top: Top, offset: int) -> None:
        self.scored_ids.append(id)
        self.logprobs.append(None if logprob is None else finite(logprob))
        self.tops.append(top)
        self.offsets.append(offset)


@dataclass(frozen=True, slots=True)
class Reading:
    """What all choices of a request share."""

    tokenizer: Any
    strings: TokenStrings
    eos_token_ids: Sequence[int]
    top_logprobs: int | None
    """Alternatives of every token; None: no log-probabilities at all."""
    logprobs_mode: LogprobsMode
    include_stop: bool
    shown: frozenset[int] = frozenset()
    """Special tokens that stay in the text."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as it is repeated in front of the completion: its text and, if asked for, its log-probabilities."""

    piece: Piece

    @classmethod
    def of(cls, prompt: PromptTokens, scored: ScoredSequence | None, reading: Reading) -> Echo:
        decoder = IncrementalText(reading.tokenizer, skip_special_tokens=False)
        offsets = []
        for id in prompt.ids:
            offsets.append(decoder.length)
            decoder.push([id])
        decoder.finish()
        piece = Piece(text=decoder.text if prompt.text is None else prompt.text)
        if scored is not None:
            offsets = _offsets_in(piece.text, decoder.text, offsets)
            tops = scored.top_logprobs or (None,) * len(prompt.ids)
            for id, offset, value, top in zip(prompt.ids, offsets, scored.logprobs, tops, strict=True):
                piece.add(id, value, top or (), offset)
        return cls(piece)


def _offsets_in(text: str, decoded: str, offsets: list[int]) -> list[int]:
    """Places in `decoded`, as places in the text the prompt came as: a start token that the tokenizer added has no
    text there, and a tokenizer that normalises may be off by what it changed."""
    shift = len(decoded) - len(text) if decoded.endswith(text) else max(decoded.find(text), 0)
    return [min(max(offset - shift, 0), len(text)) for offset in offsets]


class Choice:
    """Follows one row. `start` once, `push` for tokens as they come, `finish` with the row; the pieces add up. Each
    route writes them in its own way: `whole` in a reply, `part` in an event of a stream."""

    def __init__(self, index: int, reading: Reading, sampling: SamplingParams, echo: Echo | None) -> None:
        self.index = index
        self._reading = reading
        self._echo = echo
        self._start = len(echo.piece.text) if echo else 0
        self._sampling = sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(reading.eos_token_ids))
        self._text = RowText(reading.tokenizer, stops=sampling.stop, ends=ends, shown=reading.shown)
        self._taken = 0
        # Tokens of text that a stop string may still take back: where that is cut decides where they begin.
        self._waiting: list[tuple[int, float, Top, int]] = []

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
        whole = rollout_text(rollout, reading.tokenizer, include_stop=reading.include_stop, shown=reading.shown)
        piece = Piece(text=self._text.finish(whole))
        self._release(piece, len(whole), final=True)
        piece.finish_reason, piece.stop_reason = rollout.finish_reason, rollout.stop_reason
        piece.rollout = {
            "versions": [span_entry(span) for span in rollout.spans],
            "logprobs_mode": reading.logprobs_mode,
        }
        if rollout.error is not None:
            piece.rollout["error"] = error_entry(rollout)
        return piece

    def _take(self, id: int, logprob: float, sampling_logprob: float, top: Top) -> int:
        """Adds a token; returns where in the sampled text it begins."""
        self._taken += 1
        offset = self._text.push(id)
        reading = self._reading
        value = logprob
        if reading.top_logprobs is not None and reading.logprobs_mode == "processed_logprobs":
            value = sampling_logprob
            top = processed_top(top, logprob=logprob, sampling_logprob=sampling_logprob, sampling=self._sampling)
        self._waiting.append((id, value, top[: reading.top_logprobs], offset))
        return offset

    def _release(self, piece: Piece, sent: int, *, final: bool) -> None:
        """Tokens that begin within the first `sent` characters; at the end all, those that were cut off begin there."""
        ready = len(self._waiting)
        if not final:
            ready = next((at for at, token in enumerate(self._waiting) if token[3] > sent), ready)
        for id, value, top, offset in self._waiting[:ready]:
            piece.token_ids.append(id)
            if self._reading.top_logprobs is not None:
                piece.add(id, value, top, self._start + min(offset, sent))
        del self._waiting[:ready]

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of a reply, from all its pieces."""
        raise NotImplementedError

    def part(self, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        """The choice of an event; None if the piece holds nothing that is news to the client."""
        raise NotImplementedError

    def told(self, piece: Piece, *, token_ids: bool) -> bool:
        """Whether the piece holds tokens, for a client that asked for them."""
        return bool(piece.token_ids) and (token_ids or self._reading.top_logprobs is not None)
