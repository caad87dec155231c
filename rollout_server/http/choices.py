"""One choice of a completion: a row as the OpenAI route shows it, in one piece or in pieces that add up to it."""

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
from rollout_server.schemas.completions import CompletionsRequest

Top = Sequence[tuple[int, float]]


@dataclass(slots=True)
class Piece:
    """What a choice gained: text, tokens and their log-probabilities, and at the end how it ended."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float | None] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    rollout: dict[str, Any] | None = None

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.text + other.text,
            self.token_ids + other.token_ids,
            self.tokens + other.tokens,
            self.token_logprobs + other.token_logprobs,
            self.top_logprobs + other.top_logprobs,
            self.text_offset + other.text_offset,
            other.finish_reason,
            other.stop_reason,
            other.rollout,
        )

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.tokens or self.finish_reason)


@dataclass(frozen=True, slots=True)
class Reading:
    """What all choices of a request share."""

    request: CompletionsRequest
    tokenizer: Any
    strings: TokenStrings
    eos_token_ids: Sequence[int]


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
                _add(piece, reading, id, offset, value, top or ())
        return cls(piece)


def _offsets_in(text: str, decoded: str, offsets: list[int]) -> list[int]:
    """Places in `decoded`, as places in the text the prompt came as: a start token that the tokenizer added has no
    text there, and a tokenizer that normalises may be off by what it changed."""
    shift = len(decoded) - len(text) if decoded.endswith(text) else max(decoded.find(text), 0)
    return [min(max(offset - shift, 0), len(text)) for offset in offsets]


class Choice:
    """Follows one row. `start` once, `push` for tokens as they come, `finish` with the row; the pieces add up."""

    def __init__(self, index: int, reading: Reading, sampling: SamplingParams, echo: Echo | None) -> None:
        self.index = index
        self._reading = reading
        self._echo = echo
        self._start = len(echo.piece.text) if echo else 0
        self._sampling = sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(reading.eos_token_ids))
        self._text = RowText(reading.tokenizer, stops=sampling.stop, ends=ends)
        self._taken = 0

    def start(self) -> Piece:
        return self._echo.piece if self._echo else Piece()

    def push(self, event: TokensSampled) -> Piece:
        piece = Piece()
        for at, id in enumerate(event.token_ids):
            top = event.top_logprobs[at] if event.top_logprobs else ()
            self._take(piece, id, event.logprobs[at], event.sampling_logprobs[at], top)
        piece.text = self._text.ready()
        return piece

    def finish(self, rollout: Rollout) -> Piece:
        piece = Piece()
        for at in range(self._taken, len(rollout.token_ids)):
            top = rollout.top_logprobs[at] if rollout.top_logprobs else ()
            self._take(piece, rollout.token_ids[at], rollout.logprobs[at], rollout.sampling_logprobs[at], top)
        request = self._reading.request
        whole = rollout_text(rollout, self._reading.tokenizer, include_stop=request.include_stop_str_in_output)
        piece.text = self._text.finish(whole)
        # Tokens of a stop string that was cut off begin where the text ends.
        piece.text_offset = [min(offset, self._start + len(whole)) for offset in piece.text_offset]
        piece.finish_reason, piece.stop_reason = rollout.finish_reason, rollout.stop_reason
        piece.rollout = {
            "versions": [span_entry(span) for span in rollout.spans],
            "logprobs_mode": request.logprobs_mode,
        }
        if rollout.error is not None:
            piece.rollout["error"] = error_entry(rollout)
        return piece

    def _take(self, piece: Piece, id: int, logprob: float, sampling_logprob: float, top: Top) -> None:
        self._taken += 1
        offset = self._start + self._text.push(id)
        request = self._reading.request
        piece.token_ids.append(id)
        if request.logprobs is None:
            return
        value = logprob
        if request.logprobs_mode == "processed_logprobs":
            value = sampling_logprob
            top = processed_top(top, logprob=logprob, sampling_logprob=sampling_logprob, sampling=self._sampling)
        _add(piece, self._reading, id, offset, value, top[: request.logprobs])


def _add(piece: Piece, reading: Reading, id: int, offset: int, value: float | None, top: Top) -> None:
    """One token in the four arrays. `top_logprobs` holds the token itself too; without a value (the first token of a
    prompt) there are no alternatives either."""
    string = reading.strings[id]
    piece.tokens.append(string)
    piece.token_logprobs.append(None if value is None else finite(value))
    piece.text_offset.append(offset)
    if value is None:
        piece.top_logprobs.append(None)
        return
    alternatives: dict[str, float | None] = {}
    for other, logprob in top:
        alternatives.setdefault(reading.strings[other], finite(logprob))
    alternatives[string] = finite(value)
    piece.top_logprobs.append(alternatives)
