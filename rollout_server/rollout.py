"""The nouns everybody shares. Standard library only; nothing here knows MLX, HTTP or asyncio.

policy   what generates: the base, or a named line of adapter versions
version  one immutable state of a policy
group    the n samples of one prompt: one prefill, one version
row      one running sequence in the batch
span     a run of tokens sampled under one version
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from enum import StrEnum

from rollout_server.errors import InvalidField, UnknownPolicy
from rollout_server.grammar import Constraint
from rollout_server.quoting import counted, quoted
from rollout_server.text.pictures.picture import Picture

BASE = "base"
MAX_SEED = 2**53 - 1
MAX_STOP_STRINGS = 64
CARRIED, RECOMPUTED = "carried", "recomputed"
"""A span's KV: what an older version left was kept, or everything before it was read again."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or a digit"


class FinishReason(StrEnum):
    """Why a row ended. The order is the number used in binary replies."""

    STOP = "stop"
    """An end token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` were sampled."""
    SUPERSEDED = "superseded"
    """A newer version of the policy arrived and the request asked to end."""
    ABORTED = "aborted"
    """The client, a deadline or an operator ended it; what exists is returned."""
    ERROR = "error"
    """The row failed; `Rollout.error` says how."""


class OnUpdate(StrEnum):
    """What a running row does when the name it follows moves to another version."""

    FINISH = "finish"
    """It ends on the version it started with."""
    SWITCH = "switch"
    """It goes on under the new version at the next step and keeps its KV."""
    ABORT = "abort"
    """It ends as `superseded` with what it has."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row is sampled. Penalties and bias change the logits, then come temperature, top-k, top-p, min-p in this
    order, each on the renormalised result of the one before, as transformers does. Raises `InvalidField` on values
    outside their domain."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]; the token that crosses the threshold is kept."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """In [0, 1], relative to the most probable token."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was sampled; a continued row's own tokens count."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it was sampled."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or sampled are divided by it, others multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), each token once."""
    constraint: Constraint | None = None
    """What its text has to match; its end tokens come when it does, and before `min_tokens` where nothing else can."""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                value = getattr(self, name)
                found = "" if isinstance(value, tuple) else f", not {quoted(value)}"
                raise InvalidField(f"{name} must be {rule}{found}.", param=name)

        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        within = f"between 0 and max_tokens ({quoted(self.max_tokens)})"
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", within)
        need(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        need(self.temperature == 0 or self.temperature >= 1e-3, "temperature", "0 (greedy) or at least 0.001")
        need(math.isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.top_k < 2**31, "top_k", "0 (off) or a positive number of tokens")
        need(math.isfinite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        need(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        need(all(self.stop), "stop", "strings that are not empty")
        for name in ("presence_penalty", "frequency_penalty"):
            need(-2 <= getattr(self, name) <= 2, name, "between -2 and 2")
        need(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "between 0.01 and 100 (1 is off)")
        need(all(-100 <= value <= 100 for _, value in self.logit_bias), "logit_bias", "values between -100 and 100")
        need(not (self.ignore_eos and self.constraint), "ignore_eos", "false where a grammar says when the text ends")
        need(len(dict(self.logit_bias)) == len(self.logit_bias), "logit_bias", "one value a token")

    @property
    def penalised(self) -> bool:
        """True if its logits depend on the tokens before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def filters(self) -> tuple[str, ...]:
        """The filters that can remove a token, by their fields; none of a greedy row."""
        off = {"top_p": 1, "top_k": 0, "min_p": 0}
        return tuple(name for name, value in off.items() if self.temperature > 0 and getattr(self, name) != value)

    @property
    def filtered(self) -> bool:
        return bool(self.filters)


def called(name: str, resident: str) -> str:
    """The address of a policy among several models: NAME, or RESIDENT/NAME; a resident's base has its own name."""
    own = resident if name == BASE else f"{resident}/{name}"
    return own if resident else name


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One immutable state of a policy. `number` grows by one per name; the base is number 0 with the base's digest."""

    name: str
    number: int
    digest: str
    """`sha256:` and 64 hex digits."""
    label: str | None = None
    resident: str = ""
    """The resident whose version it is; empty for the model of --model."""

    @property
    def called(self) -> str:
        """What requests call its policy."""
        return called(self.name, self.resident)

    def __str__(self) -> str:
        return f"{self.called}@{self.number}"


@dataclass(frozen=True, slots=True)
class PolicyAddress:
    """How a request names a policy: `NAME`, `NAME@7` or `NAME@sha256:…`. Neither number nor digest: the alias."""

    name: str
    number: int | None = None
    digest: str | None = None
    """`sha256:` and a prefix of at least 8 hex digits."""

    @classmethod
    def parse(cls, text: str, *, param: str = "policy") -> PolicyAddress:
        """Raises `UnknownPolicy` for what can be no name, and `InvalidField` for what can be no version."""
        name, at, rest = text.partition("@")
        if not NAME_PATTERN.fullmatch(name):
            raise UnknownPolicy(f"There is no policy {quoted(text)}: a name is {NAME_RULE}.", param=param)
        if not at:
            return cls(name)
        if re.fullmatch(r"0|[1-9][0-9]{0,11}", rest):
            return cls(name, number=int(rest))
        if re.fullmatch(r"sha256:[0-9a-f]{8,64}", rest):
            return cls(name, digest=rest)
        raise InvalidField(
            f"{quoted(text)} names no version: write NAME, NAME@7 or NAME@sha256: and at least 8 hex digits.",
            param=param,
        )

    @property
    def follows(self) -> bool:
        """True if what it means can change: a bare name of a pushed policy."""
        return self.name != BASE and self.number is None and self.digest is None

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.name}@{self.number}"
        return f"{self.name}@{self.digest}" if self.digest else self.name


@dataclass(frozen=True, slots=True)
class Wants:
    """What a request asks for beyond ids, `logprobs` and `sampling_logprobs`, which are always computed."""

    entropy: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    base_logprobs: bool = False
    tokens_as_they_come: bool = False
    """Stream every token, not only finished rows."""


@dataclass(frozen=True, slots=True)
class GivenSpan:
    """Tokens `start` to `end` (excluded) of a prefix, and what the client says sampled them; all None if it did not."""

    policy: str | None
    version: int | None
    digest: str | None
    label: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens that a row begins with: those of an earlier rollout, a tool's, an environment's. They count as the row's
    own for `max_tokens`, stops, penalties and draws. All tuples have the length of `token_ids`; NaN is no value."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    loss_mask: tuple[int, ...]
    spans: tuple[GivenSpan, ...]
    """Spans, which tile the tokens."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def missing(self) -> tuple[float, ...]:
        """NaN for each token, for arrays that a prefix cannot bring."""
        return (math.nan,) * len(self)


NO_PREFIX = Prefix((), (), (), (), ())


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One group: n samples of one prompt under one policy. Token ids only; text is tokenised at the HTTP edge."""

    id: str
    """The request's id, shared by all of its groups; `abort` names it."""
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    policy: PolicyAddress
    n: int = 1
    prompt_index: int = 0
    seeds: tuple[int, ...] = ()
    """One row seed per sample, see `row_seed`."""
    min_version: int | None = None
    wait_s: float | None = None
    """How long to wait for `min_version` once it is the group's turn."""
    on_update: OnUpdate = OnUpdate.FINISH
    max_staleness: int | None = None
    """Rows more versions behind the alias than this end as `superseded`."""
    wants: Wants = field(default_factory=Wants)
    prefix: Prefix = NO_PREFIX
    """The prefix that every sample begins with."""
    return_when: int | None = None
    """The group is returned when so many samples have stopped or reached their length; the others are aborted."""
    continues: bool = True
    """The text goes on behind the prompt's; else it is read as a text of its own, as a turn of a conversation is."""
    shown: frozenset[int] = frozenset()
    """Special tokens that stand in the text; others are left out."""
    pictures: tuple[Picture, ...] = ()
    """What the placeholders among `given_ids` stand for, in their order; what is left of them in a prefix is text."""

    @property
    def given_ids(self) -> tuple[int, ...]:
        """All ids that the model reads before it samples."""
        return self.prompt_ids + self.prefix.token_ids

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidField("The prompt is empty: give at least one token.", param="prompt")
        if self.n < 1:
            raise InvalidField(f"n must be at least 1, not {quoted(self.n)}.", param="n")
        if len(self.seeds) != self.n:
            wanted = f"{counted(self.n, 'sample')} need as many seeds"
            raise InvalidField(f"{wanted}, not {len(self.seeds)}.", param="seed")
        if self.sampling.max_tokens <= len(self.prefix):
            raise InvalidField(
                f"max_tokens is {quoted(self.sampling.max_tokens)} and counts the prefix, which has "
                f"{counted(len(self.prefix), 'token')} already: it must be larger.",
                param="max_tokens",
            )
        if self.return_when is not None and not 1 <= self.return_when <= self.n:
            raise InvalidField(
                f"return_when waits for {quoted(self.return_when)} finished samples of {quoted(self.n)}.",
                param="return_when",
            )


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` (included) to `end` (excluded) were sampled under `version`."""

    version: PolicyVersion
    start: int
    end: int
    kv: str | None = None
    """`carried`: it read KV that an older version computed; `recomputed`: all before it was read again."""


@dataclass(frozen=True, slots=True)
class SpanAddress:
    """A span as a request writes it: tokens `start` to `end` (excluded) are to be read under what `address` names."""

    address: PolicyAddress
    start: int
    end: int
    digest: str | None = None
    """What the version's digest has to be."""
    kv: str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds a row waited, was in prefill (its group's), in decode, and until its first token came, if any."""

    queued_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RowReward:
    """What a reward model gave a row under `version`; or, with `error`, why it gave nothing."""

    scores: tuple[float, ...] = ()
    """Scores of each label, as the head gives them."""
    version: PolicyVersion | None = None
    error: RowError | None = None

    @property
    def value(self) -> float | None:
        """The score of the only label; None where there are several."""
        return self.scores[0] if len(self.scores) == 1 else None


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a trainer stores. All per-token tuples have the length of `token_ids`; `None` means not asked for.
    Log-probabilities are natural logarithms in float32 precision."""

    prompt_index: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The prefix, if there is one, and exactly what was sampled, the end token included."""
    logprobs: tuple[float, ...]
    """log-softmax of the model's unmodified float32 logits at the token."""
    sampling_logprobs: tuple[float, ...]
    """log-probability under the distribution sampled from; 0.0 for greedy rows."""
    log_kept_mass: tuple[float, ...]
    """log-mass the filters left, at the row's temperature; 0.0 without filters, NaN for greedy rows."""
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string, the stop token's id, or the cause of an abort."""
    seed: int
    sampling: SamplingParams
    timings: Timings
    entropy: tuple[float, ...] | None = None
    """Entropy of the unmodified distribution, in nats."""
    top_logprobs: tuple[tuple[tuple[int, float], ...] | None, ...] | None = None
    """The k most probable (id, log-probability) of the unmodified distribution, best first; None in a prefix."""
    prompt_logprobs: tuple[float | None, ...] | None = None
    base_logprobs: tuple[float, ...] | None = None
    """`logprobs` of the same tokens under the base; None also where the request ended before they were computed."""
    error: RowError | None = None
    cached_tokens: int = 0
    """How many of the prompt's tokens were not read again, since the prefix cache had their KV."""
    prefix: Prefix = NO_PREFIX
    """What `token_ids` begin with; `spans` tile the tokens behind it."""
    reward: RowReward | None = None
    """None unless the request names a reward model."""

    @property
    def sampled(self) -> int:
        """Tokens that are its own work."""
        return len(self.token_ids) - len(self.prefix)


def row_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one row: the request's own for the first, else a 53-bit hash, so that equal prompts still differ."""
    if prompt_index == 0 and sample_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{prompt_index}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11
