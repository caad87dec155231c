"""What is scored, embedded or classified: sequences as runs of inputs under versions, and how far each got.

Input i of a sequence is its token i; reading it gives the distribution of token i + 1. The last token is no input,
unless its hidden state is wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout_server.engine.batch.row import Group, TopTokens
from rollout_server.engine.kv_cache.prefix_tree import Key
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.messages.options import PoolingKind
from rollout_server.engine.messages.scoring import ScoredSequence
from rollout_server.engine.scoring.labels import WORTH, LabelReading, alike
from rollout_server.engine.scoring.replay import RowReplay
from rollout_server.errors import RolloutError
from rollout_server.rollout import RECOMPUTED, PolicyVersion, Span
from rollout_server.text.pictures.picture import Picture

if TYPE_CHECKING:
    from rollout_server.engine.sight.sight import Sight


@dataclass(frozen=True, slots=True)
class VersionRun:
    """Inputs `begin` to `end` (excluded) are read under one version; those from `scored` on give values. A later run
    that begins at 0 reads everything again."""

    begin: int
    end: int
    scored: int
    version: PolicyVersion
    placement: Any
    """What `PolicyTable.acquire` gave for the version."""


def runs_of(start: int, spans: Sequence[tuple[Span, Any]]) -> tuple[VersionRun, ...]:
    """Spans with their placements, positions counting from `start`, as runs. What stands before the first span is read
    under its version."""
    runs: list[VersionRun] = []
    read = 0
    for span, placement in spans:
        scored, end = max(start + span.start, 1) - 1, start + span.end - 1
        if scored < end:
            runs.append(VersionRun(0 if span.kv == RECOMPUTED else read, end, scored, span.version, placement))
            read = end
    return tuple(runs)


@dataclass(slots=True, eq=False)
class ScoredSequenceState:
    """One sequence on its way through the model."""

    job: ScoreJob
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    runs: tuple[VersionRun, ...]
    at_run: int = 0
    next_input: int = 0
    """The next input."""
    place: int = -1
    """Where its KV is, in a store of rows."""
    fault: RolloutError | None = None
    replay: RowReplay | None = None
    """Its tokens, where they are drawn again as well."""
    pool: Pool | None = None
    """Its vector, where that is what is wanted: the last token is an input then, too."""
    labels: LabelReading | None = None
    """Its label scores, likewise."""
    sight: Sight | None = None
    """Where its pictures stand; None without any."""
    logprobs: list[float | None] = field(default_factory=list)
    entropies: list[float | None] = field(default_factory=list)
    tops: list[TopTokens | None] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.at_run == len(self.runs) or self.fault is not None

    @property
    def run(self) -> VersionRun:
        return self.runs[self.at_run]

    @property
    def scoring(self) -> bool:
        """True if its next inputs give values, and not KV alone."""
        return self.next_input >= self.run.scored

    @property
    def of_states(self) -> bool:
        """True where values are made of hidden states, and not of logits."""
        return self.pool is not None or (self.labels is not None and self.labels.head is not None)

    @property
    def left_alike(self) -> int:
        """Inputs up to where the version changes or values begin."""
        return (self.run.end if self.scoring else self.run.scored) - self.next_input

    @property
    def left(self) -> int:
        """Inputs that are still to be read."""
        if self.ended:
            return 0
        return self.run.end - self.next_input + sum(run.end - run.begin for run in self.runs[self.at_run + 1 :])

    @property
    def length(self) -> int:
        """KV columns it fills."""
        return len(self.tokens) - (self.pool is None and self.labels is None)

    def chunk(self, count: int) -> int:
        """How many inputs are read next where about `count` are to be."""
        return count if self.sight is None else self.sight.chunk(self.next_input, count)

    def advance(self, count: int) -> None:
        """Counts `count` inputs of the current run as read."""
        self.next_input += count
        if self.next_input == self.run.end:
            self.at_run += 1
            if not self.ended:
                self.next_input = self.run.begin

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
class SharedPrefix:
    """Sequences that begin alike: `prompt` is read once for all of them."""

    prompt: Prompt
    waiting: deque[ScoredSequenceState]
    """Sequences that are not in the reader yet."""
    joining: bool = False
    """In the reader, its prompt not read yet."""
    awaited: Prompt | None = None
    """The prompt of another job that it has waited for, to have its KV."""

    @property
    def length(self) -> int:
        """KV columns the longest of those that wait fills."""
        return max(sequence.length for sequence in self.waiting)

    def own(self, sequence: ScoredSequenceState) -> int:
        """Inputs a sequence that is not seated has to read besides the prompt."""
        return sequence.left - len(self.prompt.tokens)


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
    owner: str = ""
    """The request whose end is its end too, if it scores a row of one."""
    key: Key | None = None
    """What the KV of its prompts is kept under for other jobs; None where none will come for it."""
    sequences: list[ScoredSequenceState] = field(default_factory=list)
    prefixes: deque[SharedPrefix] = field(default_factory=deque)
    """Those with sequences that are not in the reader yet."""
    reading: int = 0
    """Sequences in the reader."""
    open: int = 0
    """Sequences that have not ended."""

    def shows(self, pictures: Collection[Picture]) -> bool:
        """Returns whether one of these pictures stands in a sequence."""
        return any(sequence.sight is not None and sequence.sight.shows(pictures) for sequence in self.sequences)

    def embed(
        self,
        tokens: tuple[int, ...],
        version: PolicyVersion,
        placement: Any,
        kind: PoolingKind,
        sight: Sight | None = None,
    ) -> None:
        """A sequence whose hidden states are pooled."""
        pool = Pool(kind, len(tokens))
        sequence = ScoredSequenceState(
            self, tokens, (), (VersionRun(0, len(tokens), pool.first, version, placement),), pool=pool, sight=sight
        )
        self.sequences.append(sequence)
        self.open += 1
        self.prefixes.append(SharedPrefix(Prompt(tokens[: pool.first], placement, sight=sight), deque([sequence])))

    def classify(
        self,
        members: Sequence[tuple[tuple[int, ...], LabelReading, Sight | None]],
        version: PolicyVersion,
        placement: Any,
        shared: int = 0,
    ) -> None:
        """Sequences whose label scores are read. Nothing is read behind the last position of one. With their `shared`
        first tokens, sequences of other jobs begin as well."""
        tokens = [given[: reading.positions[-1] + 1] for given, reading, _ in members]
        readings, sights = [reading for _, reading, _ in members], [sight for _, _, sight in members]
        # A picture is no beginning that others share in part: it may have to be read in one chunk.
        keys = [given if sight is None else sight.key_of(given) for given, sight in zip(tokens, sights, strict=True)]
        firsts = [reading.positions[0] for reading in readings]
        most = [at if sight is None else sight.before(at) for at, sight in zip(firsts, sights, strict=True)]
        for indices, together in alike(keys, most):
            if len(indices) == 1 and shared >= WORTH:
                sight = sights[indices[0]]
                together = min(shared if sight is None else sight.before(shared), most[indices[0]])
            made = []
            for index in indices:
                reading = readings[index]
                # A head costs only where it is applied; logits cost in every position of a forward.
                scored = together if reading.head is not None else most[index]
                run = VersionRun(0, len(tokens[index]), scored, version, placement)
                made.append(ScoredSequenceState(self, tokens[index], (), (run,), labels=reading, sight=sights[index]))
            self.sequences += made
            prompt = tokens[indices[0]][: together if len(made) > 1 else made[0].run.scored]
            self.prefixes.append(SharedPrefix(Prompt(prompt, placement, sight=sights[indices[0]]), deque(made)))
        self.open += len(members)

    def add(
        self,
        members: Sequence[tuple[tuple[int, ...], int, Sequence[tuple[Span, Any]]]],
        shared: int = 0,
        sight: Sight | None = None,
    ) -> None:
        """A shared prefix of (tokens, start, spans with their placements) whose first `shared` inputs are the same, and
        all of whose pictures stand in it, as `sight` says."""
        made = []
        for tokens, start, spans in members:
            own = tuple(span for span, _ in spans)
            sequence = ScoredSequenceState(self, tokens, own, runs_of(start, spans), sight=sight)
            if start == 0:
                sequence.keep(None, None, None)
            self.sequences.append(sequence)
            if not sequence.ended:
                made.append(sequence)
        self.open += len(made)
        if made:
            first = made[0].run
            # A single sequence shares with nobody: its prompt is all that needs no values.
            shared = min(shared if len(members) > 1 else first.scored, first.scored)
            self.prefixes.append(
                SharedPrefix(Prompt(made[0].tokens[:shared], first.placement, sight=sight), deque(made))
            )


@dataclass(slots=True, eq=False)
class Pool:
    """The vector of one sequence of `length` tokens, as far as it has been read."""

    kind: PoolingKind
    length: int
    total: np.ndarray | None = None
    """float64 [width]: sum of the states taken."""

    @property
    def first(self) -> int:
        """The first input whose state counts; all behind it do."""
        return 0 if self.kind == "mean" else self.length - 1

    @property
    def vector(self) -> bytes:
        """Little-endian float32 [width], once everything was read."""
        if self.total is None:
            raise RuntimeError("A sequence is pooled before it was read.")
        return (self.total / (self.length - self.first)).astype("<f4").tobytes()
