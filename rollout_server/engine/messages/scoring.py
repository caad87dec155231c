"""Reading without sampling, across the border: teacher forcing, replay, embeddings, label scores."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.engine.messages.options import Activation
from rollout_server.rollout import (
    PolicyAddress,
    PolicyVersion,
    SamplingParams,
    Span,
    SpanAddress,
)
from rollout_server.text.pictures.picture import Picture

Pictures = tuple[tuple[Picture, ...], ...]
"""What the placeholders of each sequence stand for, in their order; empty where no sequence has any."""


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """A rollout as it was recorded. `judged` and `logprobs` have the length of `token_ids`."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    spans: tuple[SpanAddress, ...]
    """What each token was sampled under. They tile `token_ids`, or are empty if nothing of it is to be read."""
    judged: tuple[bool, ...]
    """False: given to the row, so it is read and not drawn."""
    logprobs: tuple[float | None, ...]
    sampling: SamplingParams
    seed: int
    pictures: tuple[Picture, ...] = ()
    """What the placeholders of its prompt stand for."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Draw the tokens of rows again, each from the logits after the recorded ones before it."""

    id: str
    rows: tuple[RecordedRow, ...]


@dataclass(frozen=True, slots=True)
class ReplayedRow:
    first_difference: int | None
    """Index in `token_ids` of the first token that is drawn otherwise now; None if there is none."""
    margin: float | None
    """By how much it is another one, see `replay.RowReplay.margin`; None also where it could not have been drawn."""
    max_abs_logprob_difference: float | None
    """Over the judged tokens that have a recorded log-probability; None if none has."""

    @property
    def exact(self) -> bool:
        return self.first_difference is None


@dataclass(frozen=True, slots=True)
class Replayed:
    """In the order of the request."""

    id: str
    rows: tuple[ReplayedRow, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Teacher forcing: log-probabilities of given tokens."""

    id: str
    policy: PolicyAddress
    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    """First scored position of each sequence; position 0 has no log-probability."""
    temperature: float = 1.0
    entropy: bool = False
    top_logprobs: int = 0
    spans: tuple[tuple[SpanAddress, ...] | None, ...] = ()
    """For each sequence the versions it is read under, or None for `policy` alone; empty if no sequence has any."""
    by_digest: bool = False
    """Spans that carry a digest mean the newest kept version that has it, whatever its number."""
    pictures: Pictures = ()


@dataclass(frozen=True, slots=True)
class Embed:
    """Pooled hidden states, final norm included, of given tokens under a policy."""

    id: str
    policy: PolicyAddress
    sequences: tuple[tuple[int, ...], ...]
    pictures: Pictures = ()


@dataclass(frozen=True, slots=True)
class Classify:
    """Label scores of given tokens at given positions, by the head that a policy has; or, with `label_token_ids`, the
    log-probabilities of these tokens behind each position, which every decoder gives."""

    id: str
    policy: PolicyAddress
    sequences: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    """Places in each sequence, ascending. What stands behind the last one is not read."""
    label_token_ids: tuple[int, ...] = ()
    types: tuple[tuple[int, ...], ...] = ()
    """Token types of each sequence, as many as it has tokens; empty where all of them are 0."""
    held: str = ""
    """The id of a `HoldScorer`: the version that it keeps is what reads, whatever `policy` has come to mean."""
    pictures: Pictures = ()
    shared: int = 0
    """How many of its first tokens each sequence has in common with others that will be sent later; what was read of
    them is kept."""


@dataclass(frozen=True, slots=True)
class HoldScorer:
    """Keeps what an address means now, for label scores that are asked for later, until it is let go."""

    id: str
    owner: str
    """The request whose rows are scored; whatever ends it ends the reading for it too."""
    policy: PolicyAddress
    elsewhere: bool = False
    """True where its rows run in another engine: this one cannot know whether they have ended."""


@dataclass(frozen=True, slots=True)
class LetScorerGo:
    """Nothing more will be asked of what `HoldScorer` keeps under this id; unknown ones are ignored."""

    id: str


ScoringCommand = Score | Replay | Embed | Classify
"""Requests that are answered by reading alone: nothing is sampled."""


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """Values for positions `start…`; position 0 is `None`."""

    logprobs: tuple[float | None, ...]
    entropy: tuple[float | None, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...] | None, ...] | None = None
    spans: tuple[Span, ...] = ()
    """What it was read under; positions count from `start`."""


@dataclass(frozen=True, slots=True)
class Scored:
    id: str
    version: PolicyVersion
    """What the request's policy meant."""
    temperature: float
    sequences: tuple[ScoredSequence, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """In the order of the request."""

    id: str
    version: PolicyVersion
    vectors: tuple[bytes, ...]
    """Each `Embedding.width` little-endian float32, pooled and nothing else."""


@dataclass(frozen=True, slots=True)
class Classified:
    """In the order of the request."""

    id: str
    version: PolicyVersion
    scores: tuple[bytes, ...]
    """Each [positions, labels] little-endian float32, as the head gives them."""
    labels: tuple[str | None, ...]
    """The names of labels, None for one that has no name."""
    activation: Activation
    """What makes probabilities of them."""


@dataclass(frozen=True, slots=True)
class ScorerHeld:
    id: str
    version: PolicyVersion
    labels: tuple[str | None, ...]
