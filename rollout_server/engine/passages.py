"""What is scored or embedded: sequences as runs of inputs under versions, and how far each got.

Input i of a sequence is its token i; reading it gives the distribution of token i + 1. The last token is no input,
unless its hidden state is wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout_server.engine.cache import Prompt
from rollout_server.engine.embedding_messages import PoolingKind
from rollout_server.engine.messages import ScoredSequence
from rollout_server.engine.pooling import Pool
from rollout_server.engine.redraw import Redraw
from rollout_server.engine.sequence import Group, TopTokens
from rollout_server.errors import RolloutError
from rollout_server.rollout import RECOMPUTED, PolicyVersion, Span


@dataclass(frozen=True, slots=True)
class Leg:
    """Inputs `begin` to `end` (excluded) are read under one version; those from `scored` on give values. A later leg
    that begins at 0 reads everything again."""

    begin: int
    end: int
    scored: int
    version: PolicyVersion
    slot: Any
    """What `PolicyTable.acquire` gave for the version."""


def legs_of(start: int, spans: Sequence[tuple[Span, Any]]) -> tuple[Leg, ...]:
    """Spans with their slots, positions counting from `start`, as legs. What stands before the first span is read
    under its version."""
    legs: list[Leg] = []
    read = 0
    for span, slot in spans:
        scored, end = max(start + span.start, 1) - 1, start + span.end - 1
        if scored < end:
            legs.append(Leg(0 if span.kv == RECOMPUTED else read, end, scored, span.version, slot))
            read = end
    return tuple(legs)


@dataclass(slots=True, eq=False)
class Passage:
    """One sequence on its way through the model."""

    job: ScoreJob
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    legs: tuple[Leg, ...]
    at_leg: int = 0
    fed: int = 0
    """The next input."""
    place: int = -1
    """Where its KV is, in a store of rows."""
    fault: RolloutError | None = None
    redraw: Redraw | None = None
    """Its tokens, where they are drawn again as well."""
    pool: Pool | None = None
    """Its vector, where that is what is wanted: the last token is an input then, too."""
    logprobs: list[float | None] = field(default_factory=list)
    entropies: list[float | None] = field(default_factory=list)
    tops: list[TopTokens | None] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.at_leg == len(self.legs) or self.fault is not None

    @property
    def leg(self) -> Leg:
        return self.legs[self.at_leg]

    @property
    def scoring(self) -> bool:
        """Whether its next inputs give values, or only KV."""
        return self.fed >= self.leg.scored

    @property
    def left_alike(self) -> int:
        """Inputs up to where the version changes or values begin."""
        return (self.leg.end if self.scoring else self.leg.scored) - self.fed

    @property
    def left(self) -> int:
        """Inputs that are still to be read."""
        if self.ended:
            return 0
        return self.leg.end - self.fed + sum(leg.end - leg.begin for leg in self.legs[self.at_leg + 1 :])

    @property
    def length(self) -> int:
        """KV columns it fills."""
        return len(self.tokens) - (self.pool is None)

    def feed(self, count: int) -> None:
        """Counts `count` inputs of the current leg as read."""
        self.fed += count
        if self.fed == self.leg.end:
            self.at_leg += 1
            if not self.ended:
                self.fed = self.leg.begin

    def keep(self, logprob: float | None, entropy: float | None, top: TopTokens | None) -> None:
        self.logprobs.append(logprob)
        self.entropies.append(entropy)
        self.tops.append(top)

    @property
    def scored(self) -> ScoredSequence:
        return ScoredSequence(
            tuple(self.logprobs),
            tuple(self.entropies) if self.job.entropy else None,
            tuple(self.tops) if self.job.top_logprobs else None,
            self.spans,
        )


@dataclass(slots=True, eq=False)
class Family:
    """Passages that begin alike: `prompt` is read once for all of them."""

    prompt: Prompt
    waiting: deque[Passage]
    """Passages that are not in the reader yet."""
    joining: bool = False
    """In the reader, its prompt not read yet."""

    @property
    def length(self) -> int:
        """KV columns the longest of those that wait fills."""
        return max(passage.length for passage in self.waiting)

    def own(self, passage: Passage) -> int:
        """Inputs a passage that is not seated has to read besides the prompt."""
        return passage.left - len(self.prompt.tokens)


@dataclass(slots=True, eq=False)
class ScoreJob:
    """Sequences scored for one request. `versions` are held with one reference each until it ends."""

    id: str
    versions: tuple[PolicyVersion, ...]
    finished: Callable[[tuple[ScoredSequence, ...]], None]
    """Called on the engine thread with the results, in order."""
    failed: Callable[[RolloutError], None]
    temperature: float = 1.0
    entropy: bool = False
    top_logprobs: int = 0
    group: Group | None = None
    """The group it scores something of; None for a request of its own."""
    passages: list[Passage] = field(default_factory=list)
    families: deque[Family] = field(default_factory=deque)
    """Those with passages that are not in the reader yet."""
    reading: int = 0
    """Passages in the reader."""
    open: int = 0
    """Passages that have not ended."""

    def embed(self, tokens: tuple[int, ...], version: PolicyVersion, slot: Any, kind: PoolingKind) -> None:
        """A sequence whose hidden states are pooled."""
        pool = Pool(kind, len(tokens))
        passage = Passage(self, tokens, (), (Leg(0, len(tokens), pool.first, version, slot),), pool=pool)
        self.passages.append(passage)
        self.open += 1
        self.families.append(Family(Prompt(tokens[: pool.first], slot), deque([passage])))

    def add(self, members: Sequence[tuple[tuple[int, ...], int, Sequence[tuple[Span, Any]]]], shared: int = 0) -> None:
        """A family of (tokens, start, spans with their slots) whose first `shared` inputs are the same."""
        made = []
        for tokens, start, spans in members:
            passage = Passage(self, tokens, tuple(span for span, _ in spans), legs_of(start, spans))
            if start == 0:
                passage.keep(None, None, None)
            self.passages.append(passage)
            if not passage.ended:
                made.append(passage)
        self.open += len(made)
        if made:
            first = made[0].leg
            # A single sequence shares with nobody: its prompt is all that needs no values.
            shared = min(shared if len(members) > 1 else first.scored, first.scored)
            self.families.append(Family(Prompt(made[0].tokens[:shared], first.slot), deque(made)))
