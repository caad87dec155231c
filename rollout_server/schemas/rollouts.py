"""`POST /v1/rollouts`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.quoting import quoted
from rollout_server.schemas.fields import (
    Count,
    LogitBias,
    OneOrMany,
    PolicyText,
    Request,
    RequestId,
    SamplingNumbers,
    Seed,
    TokenIds,
    Whole,
    exactly_one,
)
from rollout_server.schemas.messages import ImageUrls, Messages
from rollout_server.schemas.spans import SpanToKeep
from rollout_server.schemas.structured import EffectiveStructure, Structured

SERVED_RETURNS = ("text", "sampling_logprobs", "entropy", "base_logprobs", "prompt_logprobs")


class SamplingOptions(SamplingNumbers, Structured):
    """How to sample; the domains of the numbers are those of `rollout.SamplingParams`."""

    max_tokens: Count | None = Field(default=None, description="What fits, if absent.")
    stop: OneOrMany = Field(default_factory=list, description="Up to 64 strings.")
    stop_token_ids: TokenIds = Field(default_factory=list)
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: Seed | None = None


Logarithm = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
"""A number that float32 can hold."""


class PrefixFields(Request):
    """Tokens that every sample of the prompt begins with; the arrays and versions are those of a Rollout."""

    token_ids: TokenIds
    logprobs: list[Logarithm | None] | None = Field(default=None, description="Null where not given.")
    sampling_logprobs: list[Logarithm | None] | None = None
    versions: list[SpanToKeep] | None = Field(
        default=None,
        description="Spans that tile the tokens; a tool's text belongs to the span before it. Without them one span "
        "comes back whose policy, version, digest and label are null.",
    )
    loss_mask: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(fail_fast=True)] | None = Field(
        default=None, description="0 for all, if absent."
    )


class ReturnWhen(Request):
    finished: Count


class RewardOptions(Request):
    """A reward model that scores every row when it has finished, while others are still sampled."""

    model: PolicyText = Field(
        description="What scores whole sequences: NAME, NAME@7 or NAME@sha256:…, MODEL or MODEL/NAME."
    )
    reads: Literal["messages", "text", "token_ids"] = Field(
        default="token_ids",
        alias="as",
        description="What it reads: the ids of prompt and row as they are; the text of both, tokenized anew; or the "
        "conversation with the row as the assistant's turn, rendered without a generation prompt.",
    )
    timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = Field(
        default=None, description="A row whose reward takes longer, from its end on, is returned without it."
    )


class Prompt(Request):
    """Exactly one of `token_ids`, `text` and `messages`."""

    model_config = ConfigDict(json_schema_extra=exactly_one("token_ids", "text", "messages"))

    token_ids: TokenIds | None = None
    text: str | None = None
    messages: Messages | None = None
    images: ImageUrls | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    seed: Seed | None = None
    prefix: PrefixFields | None = Field(
        default=None,
        description="Continues a partial or multi-turn rollout: comes back in front of the new tokens. max_tokens, "
        "stops and penalties see prefix and new tokens together; `usage` counts it as prompt.",
    )
    add_special_tokens: bool = True
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Prompt:
        given = [name for name in ("token_ids", "text", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise PydanticCustomError(
                "prompt_kind",
                "must have one of token_ids, text and messages; this one has {found}",
                {"found": found},
            )
        owner = {
            "add_special_tokens": "text",
            "images": "token_ids",
            "tools": "messages",
            "chat_template_kwargs": "messages",
            "add_generation_prompt": "messages",
            "continue_final_message": "messages",
        }
        for name in sorted(self.model_fields_set & owner.keys()):
            if owner[name] != given[0]:
                raise PydanticCustomError(
                    "prompt_option",
                    "goes with {owner}, not with {kind}",
                    {"field": name, "owner": owner[name], "kind": given[0]},
                )
        return self


class RolloutsRequest(Request):
    """n samples of every prompt under one policy."""

    id: RequestId | None = Field(default=None, description="Names the request; also sent as X-Request-Id.")
    policy: PolicyText = Field(
        description="`base`, NAME, NAME@7 or NAME@sha256:…; of another model MODEL or MODEL/NAME."
    )
    prompts: Annotated[list[Prompt], Field(min_length=1)]
    n: Count = 1
    sampling: SamplingOptions = SamplingOptions()
    returns: list[str] = Field(default_factory=list, alias="return", description=f"Any of {', '.join(SERVED_RETURNS)}.")
    top_logprobs: Whole = 0
    on_update: Literal["finish", "switch", "abort"] = Field(
        default="finish",
        description="When the name moves on, running rows finish on their version, switch at the next step and keep "
        "their KV, or end as `superseded`.",
    )
    max_staleness: Whole | None = Field(default=None, description="Rows further behind the name end as `superseded`.")
    min_version: Whole | None = None
    wait_s: Annotated[float, Field(ge=0, le=31_536_000)] | None = Field(
        default=None,
        description="How long a prompt whose turn has come waits for a push that brings the name to `min_version`, "
        "letting others pass; without it, and for a name that does not exist, the answer is an error at once.",
    )
    timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    return_when: ReturnWhen | None = Field(
        default=None,
        description="A prompt is returned when so many of its samples have stopped or reached their length; the others "
        "end as `aborted` with what they have.",
    )
    reward: RewardOptions | None = Field(
        default=None,
        description="Each rollout gets its `reward`. The version that `model` means when the request comes scores all "
        "of it. A reward that fails or is late costs no rollout.",
    )
    stream: bool = Field(default=False, description="NDJSON: a line per rollout when it finishes, or has its reward.")

    @field_validator("returns")
    @classmethod
    def _known_returns(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in SERVED_RETURNS:
                raise PydanticCustomError(
                    "unknown_return",
                    "has {name}, which is nothing a rollout has; ask for {known}",
                    {"name": quoted(name), "known": ", ".join(SERVED_RETURNS)},
                )
        return value

    @model_validator(mode="after")
    def _something_to_wait_for(self) -> RolloutsRequest:
        if self.wait_s is not None and self.min_version is None:
            raise PydanticCustomError(
                "wait_without_version", "goes with min_version, which is missing", {"field": "wait_s"}
            )
        return self


# ---- replies ------------------------------------------------------------------------------------------------------


class PolicyState(BaseModel):
    """A policy and the version its alias points to; `version` and `digest` are null before the first activation."""

    name: str
    version: int | None
    digest: str | None


class BaseState(BaseModel):
    id: str
    digest: str


class SpanReply(BaseModel):
    """Tokens `start` to `end` (excluded) were sampled under this version. `kv` is `carried` where they read keys and
    values that an older version computed, `recomputed` where all before them was read again; a prefix, and what follows
    it, is `recomputed`. The first four are null for a prefix that came without versions."""

    policy: str | None
    version: int | None
    digest: str | None
    label: str | None
    start: int
    end: int
    kv: str | None = None


class ErrorInRow(BaseModel):
    code: str
    message: str


class RewardOfRow(BaseModel):
    """`scores` are those of each label, raw; `value` is that of the only one, and null where there are several."""

    value: float | None
    scores: list[float]
    model: PolicyState


class RewardFault(BaseModel):
    """Why a row has no reward."""

    error: ErrorInRow


class RowTimings(BaseModel):
    """Milliseconds."""

    queued: float
    prefill: float
    decode: float


_REQUIRED: dict[str, Any] = {name: (field.annotation, ...) for name, field in SamplingNumbers.model_fields.items()}
_Numbers: Any = create_model("_Numbers", **_REQUIRED)
"""The numbers of a request, each of them there: a reply leaves none out."""


class EffectiveSampling(_Numbers):
    max_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    logit_bias: dict[str, float]
    structured_outputs: EffectiveStructure | None


class RolloutReply(BaseModel):
    """One sample. Per-token arrays have the length of `token_ids`; they are null unless asked for, except
    `loss_mask` and `logprobs`, and their values are null in a prefix unless they came with it. `base_logprobs` are null
    too where the request was ended before they were computed; for rows sampled on the base they are `logprobs`, bit for
    bit."""

    id: str
    prompt_id: str | None
    prompt_index: int
    sample_index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float | None]
    sampling_logprobs: list[float | None] | None
    log_kept_mass: list[float | None] | None
    entropy: list[float | None] | None
    base_logprobs: list[float | None] | None
    top_logprobs: list[list[tuple[int, float | None]] | None] | None
    prompt_logprobs: list[float | None] | None
    versions: list[SpanReply]
    finish_reason: Literal["stop", "length", "superseded", "aborted", "error"]
    stop_reason: str | int | None
    error: ErrorInRow | None
    seed: int
    sampling: EffectiveSampling
    text: str | None
    timings_ms: RowTimings
    reward: RewardOfRow | RewardFault | None = Field(description="Null unless the request names a reward model.")


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Those whose KV was there from earlier requests.")


class Usage(BaseModel):
    """Counts of tokens; a prompt counts once whatever `n`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RequestTimings(BaseModel):
    """Milliseconds from the parsed request to the last row."""

    total: float


class RolloutsReply(BaseModel):
    id: str
    policy: PolicyState
    base: BaseState
    instance: str
    complete: bool = Field(description="Every row ended as stop or length, or `return_when` was met.")
    rollouts: list[RolloutReply]
    usage: Usage
    timings_ms: RequestTimings
