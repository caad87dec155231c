"""The mutable life of groups and rows on the engine thread. Nothing here touches an array or a queue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.placement import BASE_PLACEMENT, Placement
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.sizes import HEADROOM
from rollout_server.errors import GrammarFault, RolloutError
from rollout_server.grammar import Follower
from rollout_server.rollout import (
    CARRIED,
    RECOMPUTED,
    FinishReason,
    PolicyAddress,
    PolicyVersion,
    Rollout,
    RolloutRequest,
    RowError,
    Span,
    Timings,
)
from rollout_server.text.detokenize import IncrementalText

if TYPE_CHECKING:
    from rollout_server.engine.sight.sight import Sight

TopTokens = tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Group:
    """The n samples of one prompt. `version` and `placement` are taken when its first sample is admitted."""

    request: RolloutRequest
    sight: Sight | None = None
    """Where its pictures stand; None without any."""
    number: int = 0
    """Its place among all groups, in the order in which they came: ranks agree on that, and not on a time."""
    begins_on: int | None = None
    """The version that it begins on where it is drawn again, whatever its policy has come to name."""
    arrived: float = field(default_factory=time.monotonic)
    version: PolicyVersion | None = None
    placement: Placement = BASE_PLACEMENT
    prompt: Prompt | None = None
    admitted: int = 0
    """Samples admitted so far; they are admitted in order."""
    admitted_at: float = 0.0
    prefilled_at: float = 0.0
    prompt_logprobs: tuple[float | None, ...] | None = None
    unscored: bool = False
    """Prompt log-probabilities were asked for and are not there yet: finished rows wait for them."""
    unreferenced: bool = False
    """Log-probabilities under the base were asked for and are not there yet: rows that need them wait."""
    ended: int = 0
    """Samples that are over; the pass under the base is made when all are."""
    finished: int = 0
    """Ended samples that stopped or reached their length; `return_when` counts these."""
    withheld: list[Row] = field(default_factory=list)
    """Rows that are over and wait for values."""
    joining: int = 0
    """Admitted samples that wait for their rows to be seated; no more are admitted meanwhile."""
    cancelled: bool = False
    """Aborted before its rows were seated: its places are given back."""
    cached_tokens: int = 0
    """Tokens of its prompt whose KV was there from before."""

    def __post_init__(self) -> None:
        self.unreferenced = self.request.wants.base_logprobs

    @property
    def waiting(self) -> int:
        return self.request.n - self.admitted

    @property
    def address(self) -> PolicyAddress:
        """The version that it begins on; what its rows follow from there is the request's policy."""
        policy = self.request.policy
        return policy if self.begins_on is None else PolicyAddress(policy.name, self.begins_on)

    @property
    def columns_soon(self) -> int:
        """Columns one of its rows needs to start."""
        return min(self.length, len(self.request.given_ids) + HEADROOM)

    @property
    def length(self) -> int:
        """Columns one of its rows can fill."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Begun:
    """A span from its first token on, and where it is sampled; it goes on until the next one begins."""

    version: PolicyVersion
    start: int
    kv: str | None
    placement: Placement


@dataclass(slots=True, eq=False)
class Row:
    """One row. `len(token_ids) == len(logprobs)`; spans tile the tokens behind the prefix, which it starts with."""

    group: Group
    sample_index: int
    seed: int
    version: PolicyVersion
    placement: Placement
    text: IncrementalText | None
    """Only for rows with stop strings."""
    follower: Follower | None = None
    """Only for rows with a grammar: where in it the recorded tokens lead."""
    dispatched: int = 0
    """Tokens whose step was dispatched; at most one more than were recorded."""
    last_step: int = -1
    """Number of the last dispatched step that computes this row; its place is free once that was read."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    log_kept_mass: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    top_logprobs: list[TopTokens | None] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    """Its spans; see `spans`."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: RolloutError | None = None
    reported: bool = False
    """Its end was told, or is held until its values are there."""
    switched: bool = False
    """Its KV comes from more than one version."""
    finite: bool = False
    """Its last step gave numbers, so that all KV in its place is finite."""
    evicted: bool = False
    """Its KV was dropped for want of memory, or is being read again."""
    recomputed: bool = False
    """All its KV is read again under its present version: an earlier one is gone."""
    pinned_versions: list[PolicyVersion] = field(default_factory=list)
    """Versions kept for it while it is away."""
    base_logprobs: tuple[float, ...] | None = None
    seated_at: float = 0.0
    first_at: float = 0.0
    """When its first own token was recorded; 0 before."""
    told_at: float = 0.0
    """When a token of it was told of last, as `TokenGapCounter` noted it; 0 before there was one."""
    ended_at: float = 0.0
    _first: int = field(init=False)
    _most: int = field(init=False)
    """Column of its prompt's last token, and the tokens it may have: of the request, since every step asks for them."""

    def __post_init__(self) -> None:
        request = self.group.request
        self._first, self._most = len(request.prompt_ids) - 1, request.sampling.max_tokens
        prefix, wants = request.prefix, request.wants
        self.dispatched = len(prefix)
        self.token_ids = list(prefix.token_ids)
        self.logprobs = list(prefix.logprobs)
        self.sampling_logprobs = list(prefix.sampling_logprobs)
        self.log_kept_mass = list(prefix.missing)
        self.entropy = list(prefix.missing) if wants.entropy else []
        self.top_logprobs = [None] * len(prefix) if wants.top_logprobs else []
        if self.text is not None:
            self.text.push(prefix.token_ids)
        if request.sampling.constraint is not None:
            self.follower = request.sampling.constraint.follow(prefix.token_ids)

    @property
    def sampled(self) -> int:
        """Tokens read so far that are its own work, and no prefix."""
        return len(self.token_ids) - len(self.group.request.prefix)

    @property
    def running(self) -> bool:
        return self.finish_reason is None

    @property
    def streamed(self) -> bool:
        """True if somebody waits for each of its tokens."""
        return self.running and self.group.request.wants.tokens_as_they_come

    @property
    def wants_step(self) -> bool:
        """A length stop is known in advance and not dispatched."""
        return self.finish_reason is None and self.dispatched < self._most

    @property
    def holds_prompt(self) -> bool:
        """True if its place begins with its group's prompt as the group's version reads it."""
        if self.error is not None or self.evicted or self.recomputed:
            return False
        first = self.begun[0].version if self.begun else self.version
        return first == self.group.version and all(begun.kv != RECOMPUTED for begun in self.begun[1:])

    @property
    def needs_reference(self) -> bool:
        """True if only another pass can say what the base thinks of its tokens; a row on the base knows."""
        return self.sampled > 0 and self.version.number != 0

    @property
    def waits(self) -> bool:
        """True if values of it are still on their way."""
        prompt = self.group.unscored and self.error is None
        return prompt or (self.group.unreferenced and self.needs_reference)

    @property
    def offset(self) -> int:
        """Column of the next step's input token: the last prompt token, or the token sampled before."""
        return self._first + self.dispatched

    @property
    def columns_soon(self) -> int:
        """KV columns for its tokens so far and `HEADROOM` more."""
        return self._first + 1 + min(self._most, self.dispatched + HEADROOM)

    @property
    def delta(self) -> int:
        """The rotary position of its next token, less that token's column."""
        return self.group.sight.delta if self.group.sight is not None else 0

    @property
    def input_id(self) -> int:
        """The next step's input, known on the host only when no step is in flight."""
        return self.token_ids[-1] if self.token_ids else self.group.request.prompt_ids[-1]

    @property
    def _kv(self) -> str | None:
        """What a span that begins now reads. Whatever sampled a prefix, this version read it again."""
        if self.recomputed:
            return RECOMPUTED
        if self.switched:
            return CARRIED
        return RECOMPUTED if self.group.request.prefix.token_ids else None

    @property
    def spans(self) -> list[Span]:
        """Which version sampled which tokens, as far as steps were dispatched."""
        return self._spans(self.dispatched)

    def _spans(self, count: int) -> list[Span]:
        """The spans of the first `count` tokens."""
        ends = [*(begun.start for begun in self.begun[1:]), count]
        pairs = zip(self.begun, ends, strict=False)
        return [
            Span(begun.version, begun.start, min(end, count), begun.kv) for begun, end in pairs if begun.start < count
        ]

    @property
    def placements(self) -> list[Placement]:
        """Where each of its spans was sampled."""
        return [begun.placement for begun in self.begun]

    def stamp(self) -> None:
        """Counts a dispatched token under the version of this moment."""
        last = self.begun[-1].version if self.begun else None
        # Nearly always the same object: comparing the fields costs more than all else here.
        if self.recomputed or (last is not self.version and last != self.version):
            self.begun.append(Begun(self.version, self.dispatched, self._kv, self.placement))
            self.recomputed = False
        self.dispatched += 1

    def record(self, token: int, values: Sequence[float], top: TopTokens | None, eos: frozenset[int]) -> None:
        """Appends a sampled token and ends the row if that token ends it. Stops win over length."""
        wants, sampling = self.group.request.wants, self.group.request.sampling
        self.first_at = self.first_at or time.monotonic()
        self.token_ids.append(token)
        self.logprobs.append(values[0])
        self.sampling_logprobs.append(values[1])
        self.log_kept_mass.append(values[2])
        if wants.entropy:
            self.entropy.append(values[3])
        if wants.top_logprobs and top is not None:
            self.top_logprobs.append(top[: wants.top_logprobs])
        ends = (token in eos and not sampling.ignore_eos) or token in sampling.stop_token_ids
        full = len(self.token_ids) == sampling.max_tokens
        if (stop := self._stop_string(() if ends else (token,), last=ends or full)) is not None:
            self.end(FinishReason.STOP, stop)
        elif token in eos and not sampling.ignore_eos:
            self._end_of_turn(token)
        elif ends:
            self.end(FinishReason.STOP, token)
        elif full:
            self.end(FinishReason.LENGTH, None)
        elif self.follower is not None:
            self.follower.advance(token)

    def _end_of_turn(self, token: int) -> None:
        """A row with a grammar that is not through did not come to its end, whatever let the token come."""
        if self.follower is None or self.follower.may_end:
            self.end(FinishReason.STOP, token)
            return
        where = "before its grammar began" if self.follower.free else "in the middle of its grammar"
        self.fail(GrammarFault(f"The row ended {where}, at token {len(self.token_ids) - 1}."))

    def _stop_string(self, token: Sequence[int], *, last: bool) -> str | None:
        """The one that stands in what the token decides; the `last` one decides of an incomplete character that it is
        U+FFFD."""
        if self.text is None:
            return None
        new = len(self.text.push(token))
        if last:
            new += len(self.text.finish())
        sampling = self.group.request.sampling
        if not new or len(self.token_ids) < sampling.min_tokens:
            return None
        tail = self.text.tail(new + max(map(len, sampling.stop)) - 1)
        found = [
            (place, stop)
            for stop in sampling.stop
            # A stop string may begin in older text, but ends in what this token decided.
            if (place := tail.find(stop, max(0, len(tail) - new - len(stop) + 1))) >= 0
        ]
        return min(found)[1] if found else None

    def end(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.ended_at = time.monotonic()

    def fail(self, error: RolloutError) -> None:
        self.error = error
        self.end(FinishReason.ERROR, None)

    def rollout(self) -> Rollout:
        """What the trainer gets. A step in flight may have stamped one token more than were recorded."""
        group, count = self.group, len(self.token_ids)
        wants = group.request.wants
        return Rollout(
            prompt_index=group.request.prompt_index,
            sample_index=self.sample_index,
            prompt_ids=group.request.prompt_ids,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            sampling_logprobs=tuple(self.sampling_logprobs),
            log_kept_mass=tuple(self.log_kept_mass),
            spans=tuple(self._spans(count)),
            finish_reason=self.finish_reason or FinishReason.ABORTED,
            stop_reason=self.stop_reason,
            seed=self.seed,
            sampling=group.request.sampling,
            timings=self._timings(),
            entropy=tuple(self.entropy) if wants.entropy else None,
            top_logprobs=tuple(self.top_logprobs) if wants.top_logprobs else None,
            prompt_logprobs=group.prompt_logprobs,
            base_logprobs=self._base_logprobs(),
            error=RowError(self.error.code, self.error.message) if self.error else None,
            cached_tokens=group.cached_tokens,
            prefix=group.request.prefix,
        )

    def _base_logprobs(self) -> tuple[float, ...] | None:
        if not self.group.request.wants.base_logprobs:
            return None
        if self.needs_reference:
            return self.base_logprobs
        # What the client gave for a prefix need not be of the base.
        prefix = self.group.request.prefix
        return prefix.missing + tuple(self.logprobs[len(prefix) :])

    def _timings(self) -> Timings:
        """A sample that starts from its group's kept prefill waited until it was seated."""
        group, end = self.group, self.ended_at
        admitted = group.admitted_at or end
        prefilled = min(group.prefilled_at or end, end)
        seated = self.seated_at or prefilled
        prefill_ms = 1e3 * max(0.0, prefilled - admitted)
        return Timings(
            queued_ms=max(0.0, 1e3 * (seated - group.arrived) - prefill_ms),
            prefill_ms=prefill_ms,
            decode_ms=1e3 * max(0.0, end - seated),
            first_token_ms=1e3 * (self.first_at - group.arrived) if self.first_at else None,
        )
