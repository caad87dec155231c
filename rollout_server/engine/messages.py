"""What crosses the border of the engine thread: frozen commands in, plain events out. No arrays, locks or futures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollout_server.engine.embedding_messages import Embed, Embedded, Embedding
from rollout_server.engine.footprint import MemoryStatus, Release, Released
from rollout_server.engine.kept_prefixes import PrefixCacheReset, PrefixStatus, ResetPrefixCache
from rollout_server.engine.pause_messages import Pause, Paused, PauseMode, Resume
from rollout_server.engine.policy_messages import PolicyCommand, PolicyReply, PolicyStatus
from rollout_server.engine.replays import Replay, Replayed
from rollout_server.errors import RolloutError
from rollout_server.rollout import PolicyAddress, PolicyVersion, Rollout, RolloutRequest, Span, SpanAddress

if TYPE_CHECKING:
    from adapters.spec import Parameter, Place

KV_BUCKET = 32
"""KV columns are allocated and read in multiples of this,"""
JOINED_KV_SPARE = 256
"""and mlx-lm's own caches allocate up to so many more than they hold."""

# ---- what the engine is started with, and what it says of itself --------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to start the engine. Sizes in bytes; `None` means chosen from the machine."""

    model_path: str
    """A local directory with config.json, safetensors and tokenizer files."""
    model_id: str
    """What the base is called on the wire (Hub id, directory name or --served-model-name)."""
    context_length: int | None = None
    """At most the model's own; shorter saves nothing but bounds requests."""
    max_batch: int = 64
    """Rows that decode together."""
    kv_memory: int | None = None
    weights_memory: int | None = None
    max_queue: int = 4096
    """Requests that may wait."""
    max_rows_per_request: int = 65536
    keep_versions: int = 8
    prefill_tokens: int = 512
    """Tokens read at most between two decode steps, of prompts and of what is scored; fewer while rows decode."""
    prefix_cache: bool = True
    """Keep KV for later requests that begin with the same tokens."""
    compile_decode: bool | None = None
    """Trace decode steps; None: where the device is no CPU."""
    kv_bits: int | None = None
    """8 keeps keys and values in so many bits; None as the model computes them."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The resident base. Everything HTTP, fit checks and admission need to know without touching an array."""

    id: str
    digest: str
    model_type: str
    vocab_size: int
    max_model_len: int
    dtype: str
    """`float32`, `bfloat16` or `float16`: of activations, and of KV but for `kv_bits`."""
    quantization: dict[str, Any] | None
    eos_token_ids: tuple[int, ...]
    parameters: int
    layers: dict[str, tuple[int, int]]
    """Every layer an adapter may target: parameter path → (out features, in features)."""
    kv_bytes_per_token: int
    kv_memory: int
    cache: str
    """`slots`, `batch` (mlx-lm's batch caches) or `serial` (one row at a time)."""
    max_batch: int
    device: str
    weight_bytes: int = 0
    """Of the base, as it is in memory."""
    kv_bytes_per_row: int = 0
    """State of fixed size (recurrent layers), besides what its tokens take."""
    kv_bits: int | None = None
    """8 where keys and values are kept in so many bits; None where they are what the model computed."""
    embedding: Embedding = field(default_factory=Embedding)
    unfit: dict[Place, str] = field(default_factory=dict)
    """Kinds of layers on which this device computes adapters wrongly, and what it does there: they are refused."""
    weights: dict[str, Parameter] = field(default_factory=dict)
    """Every parameter that a version may add to or have one of its own for, by path."""

    def row_bytes(self, tokens: int) -> int:
        """KV memory of a row of so many tokens, bytes."""
        slots = -(-(tokens + 1) // KV_BUCKET) * KV_BUCKET
        columns = slots if self.cache == "slots" else tokens + JOINED_KV_SPARE
        return columns * self.kv_bytes_per_token + self.kv_bytes_per_row


# ---- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """Groups of one HTTP request; accepted or refused together."""

    id: str
    groups: tuple[RolloutRequest, ...]
    deadline: float | None = None
    """time.monotonic() at which what is left ends as `aborted` with stop_reason `timeout`."""


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


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends every row of the named requests; unknown ids are ignored."""

    ids: tuple[str, ...]
    reason: str = "abort"


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered with a `Pong` between two turns: the thread lives."""

    id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread after failing what is left by name."""


ScoringCommand = Score | Replay | Embed
"""Requests that are answered by reading alone: nothing is sampled."""
Command = Submit | ScoringCommand | PolicyCommand | Abort | Pause | Resume | Release | ResetPrefixCache | Ping | Stop

# ---- events and replies -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokensSampled:
    """New tokens of one row (only for requests that stream tokens)."""

    id: str
    prompt_index: int
    sample_index: int
    version: PolicyVersion
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class RowFinished:
    """One row is done, whatever its finish_reason."""

    id: str
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class RequestDone:
    """Terminal: every row of the request was reported."""

    id: str


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Terminal: the request ends with an error; rows reported before it stand."""

    id: str
    error: RolloutError


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
class Pong:
    id: str


Event = (
    TokensSampled
    | RowFinished
    | RequestDone
    | RequestFailed
    | Scored
    | Replayed
    | Embedded
    | PolicyReply
    | Paused
    | Released
    | PrefixCacheReset
    | Pong
)


# ---- status: one immutable snapshot, replaced by the engine thread after every change ------------------------------


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """`state` is starting, ready, stopping or dead; `fault` says why it died."""

    state: str
    fault: str | None = None
    waiting: int = 0
    """Requests in the queue."""
    running: int = 0
    """Rows in the batch."""
    preempted: int = 0
    """Rows that gave their KV up and wait to come back,"""
    preemptions: int = 0
    """and how often one did since the start."""
    policies: tuple[PolicyStatus, ...] = field(default=())
    steps: int = 0
    tokens: int = 0
    """Sampled since the start."""
    slot_bytes: int = 0
    """Device memory of all adapter slots, free ones included."""
    set_bytes: int = 0
    """Device memory of all parameter sets, the base not counted,"""
    sets: int = 0
    """and how many there are."""
    prefix: PrefixStatus = field(default_factory=PrefixStatus)
    paused: PauseMode | None = None
    """How new work is held: `wait`, `keep` or `abort`; None if it is not."""
    memory: MemoryStatus = field(default_factory=MemoryStatus)
