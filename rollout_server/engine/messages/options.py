"""What the engine is started with, and what it says of the model it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from adapters.spec import HeadTask, Parameter, Place, Scoring

KV_BUCKET = 32
"""KV columns are allocated and read in multiples of this."""
JOINED_KV_SPARE = 256
"""mlx-lm's own caches allocate up to so many columns more than they hold."""
PoolingKind = Literal["last", "mean"]
"""What a decoder's states are pooled by; an encoder's files say how it pools."""
Task = Literal["generate", "classify", "token_classify", "embed"]
"""What a model gives: tokens, label scores of a sequence, label scores of tokens, or vectors."""
Prefer = Literal["throughput", "latency"]
"""What a turn is planned for: that all rows are done soonest, or that none waits long for its next token."""
Activation = Literal["sigmoid", "softmax", "none"]
"""What makes probabilities of label scores, where those are asked for."""


@dataclass(frozen=True, slots=True)
class RankOptions:
    """One engine on several ranks, each a process with a device of its own."""

    size: int
    backend: str = "ring"
    """What MLX calls the way in which they sum: `ring`, `jaccl`, `jaccl-ring` or `nccl`."""
    launched: bool = False
    """All of them were started by `mlx.launch`; else rank 0 starts the others on its machine."""
    devices: tuple[str, ...] = ()
    """The GPU of each rank on this machine; empty where they share what there is."""
    address: str = "127.0.0.1"
    """Where rank 0 takes the connections of ranks that were launched."""
    silent_s: float = 30.0
    """A rank that is not heard of for so long ends the engine."""
    load_s: float = 1800.0
    """They may take so long to load their parts and to try them together: a rank that waits for another there waits
    for ever."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to start the engine. Sizes in bytes; `None` means chosen from the machine."""

    model_path: str
    """A local directory with config.json, safetensors and tokenizer files."""
    model_id: str
    """What the base is called on the wire (Hub id, directory name or --served-model-name)."""
    resident: str = ""
    """By which name requests tell it from other models of this process; empty for the model of --model."""
    models: tuple[str, ...] = ()
    """By which names requests tell all models of this process apart; empty where there is one."""
    memory: int | None = None
    """Bytes that weights, versions and KV may take together; None: nobody counts them together."""
    context_length: int | None = None
    """At most the model's own; shorter saves nothing but bounds requests."""
    max_batch: int | None = None
    """Rows that decode together."""
    kv_memory: int | None = None
    weights_memory: int | None = None
    max_queue: int = 4096
    """Requests that may wait."""
    max_rows_per_request: int = 65536
    keep_versions: int | None = 8
    """Newest versions kept of each name; None where versions are freed by command alone."""
    prefill_tokens: int | None = None
    """Tokens read at most in one turn, of prompts and of what is scored."""
    prefer: Prefer = "throughput"
    """`latency` reads beside rows as if each were read as it comes; under `throughput` only those are that stream."""
    prefix_cache: bool = True
    """Keep KV for later requests that begin with the same tokens."""
    compile_decode: bool | None = None
    """Trace decode steps; None: where the device is no CPU."""
    warm: bool = True
    """Run shapes of a first batch before the engine says that it is ready, where steps are compiled, as far as 30 s
    allow."""
    kv_bits: int | None = None
    """8 keeps keys and values in so many bits; None as the model computes them."""
    trace: str | None = None
    """A file to record a timeline of turns in."""
    attention: Literal["auto", "mlx"] = "auto"
    """How decode steps attend: a kernel in which each row reads its own columns, where it is right and faster; or MLX's
    own."""
    sharing: int = 1
    """How many engines share the device: each has room for its part of the memory."""
    ranks: RankOptions | None = None
    """The ranks that compute it together; None: this process alone."""
    tell_admissions: bool = False
    """Say of every group under which version it was admitted."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """How the resident model's hidden states become one vector."""

    pooling: PoolingKind = "last"
    normalise: bool = True
    """To length 1, after `dimensions` cut it."""
    width: int = 0
    refusal: str = "This model has no hidden states that it could be embedded by."
    """Why it embeds nothing, as a sentence; empty where it does."""


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
    """`slots`, `batch` (mlx-lm's batch caches), `serial` (one row at a time), or `none` of an encoder."""
    max_batch: int
    device: str
    prefill_tokens: int = 512
    """Tokens read at most in one turn."""
    weight_bytes: int = 0
    """The base's weights as they are in memory."""
    kv_bytes_per_row: int = 0
    """State of fixed size (recurrent layers), besides what its tokens take."""
    kv_bits: int | None = None
    """8 where keys and values are kept in so many bits; None where they are what the model computed."""
    embedding: Embedding = field(default_factory=Embedding)
    unfit: dict[Place, str] = field(default_factory=dict)
    """Kinds of layers on which this device computes adapters wrongly, and what it does there: they are refused."""
    no_versions: str = ""
    """Why no version can be served on this base, a half sentence; empty where versions can."""
    weights: dict[str, Parameter] = field(default_factory=dict)
    """Every parameter that a version may add to or have one of its own for, by path."""
    task: Task = "generate"
    labels: tuple[str | None, ...] = ()
    """The names of what its head scores; None for one that has no name. Empty where there is no head."""
    activation: Activation = "none"
    pad_token_id: int | None = None
    """By which the token is found that a sequence's head is read at."""
    encoder: bool = False
    """It reads sequences whole, each token with those behind it: it has no KV, and its head is part of it."""
    token_types: int = 0
    """How many types of tokens an encoder knows, by which it tells the texts of a pair apart."""

    ranks: int = 1
    """How many processes compute it together, each with a part of the layers."""
    placeholder: int | None = None
    """The token that stands for what it sees of a picture; None where it sees none."""

    @property
    def scoring(self) -> Scoring:
        """What a version's head has to fit."""
        own: HeadTask | None = self.task if self.task in ("classify", "token_classify") else None
        return Scoring(self.embedding.width, own, whole=self.encoder)

    def scores_like(self, task: HeadTask | None, labels: int) -> bool:
        """True where a version's own head scores what the base's does: names and activation of the labels are then the
        base's too. PEFT saves the head of every adapter on a classifier, and its files name no label."""
        return task is not None and (task, labels) == (self.task, len(self.labels))

    def head_position(self, tokens: Sequence[int]) -> int:
        """Where a head is read that scores a whole sequence, as transformers does: at the rightmost token that is not
        the pad token, at the first one if all of them are; at the last one where the model has no pad token."""
        if self.pad_token_id is None:
            return len(tokens) - 1
        return next((at for at in range(len(tokens) - 1, -1, -1) if tokens[at] != self.pad_token_id), 0)

    def row_bytes(self, tokens: int) -> int:
        """KV memory of a row of so many tokens, bytes."""
        slots = -(-(tokens + 1) // KV_BUCKET) * KV_BUCKET
        columns = slots if self.cache == "slots" else tokens + JOINED_KV_SPARE
        return columns * self.kv_bytes_per_token + self.kv_bytes_per_row
