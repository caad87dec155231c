"""`POST /v1/replay` and `POST /v1/probe`: rollouts that a trainer sends back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import Request, Seed, TokenIds
from rollout_server.schemas.messages import ImageUrls
from rollout_server.schemas.rollouts import BaseState, SamplingOptions
from rollout_server.schemas.spans import SpanToRead

Values = list[float | None]


class RecordedRollout(Request):
    """A Rollout as it was returned. Fields that the route does not need may be there and are not looked at."""

    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)]
    token_ids: TokenIds
    versions: list[SpanToRead]
    loss_mask: list[Annotated[int, Field(ge=0, le=1)]] | None = Field(
        default=None, description="0: the token was given to the row and is only read. Absent: all were sampled."
    )
    logprobs: Values | None = None
    sampling_logprobs: Values | None = None
    log_kept_mass: Values | None = None
    sampling: SamplingOptions | None = None
    seed: Seed | None = None
    images: ImageUrls | None = None

    id: Any = None
    prompt_id: Any = None
    prompt_index: Any = None
    sample_index: Any = None
    entropy: Any = None
    base_logprobs: Any = None
    top_logprobs: Any = None
    prompt_logprobs: Any = None
    finish_reason: Any = None
    stop_reason: Any = None
    error: Any = None
    text: Any = None
    timings_ms: Any = None
    reward: Any = None

    @model_validator(mode="after")
    def _as_long_as_its_tokens(self) -> RecordedRollout:
        for name in ("loss_mask", "logprobs", "sampling_logprobs", "log_kept_mass", "trainer_logprobs"):
            values = getattr(self, name, None)
            if values is not None and len(values) != len(self.token_ids):
                raise PydanticCustomError(
                    "per_token",
                    "has {count} values for {tokens} tokens",
                    {"field": name, "count": len(values), "tokens": len(self.token_ids)},
                )
        return self


class RolloutToReplay(RecordedRollout):
    sampling: SamplingOptions
    seed: Seed


class ReplayRequest(Request):
    rollouts: Annotated[list[RolloutToReplay], Field(min_length=1)]


class RolloutToProbe(RecordedRollout):
    trainer_logprobs: Values = Field(
        description="What the trainer's own forward gives for each token, at the request's temperature; null: masked."
    )


class ProbeRequest(Request):
    rollouts: Annotated[list[RolloutToProbe], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=1e-3, le=100)] = Field(
        default=1.0, description="By which the trainer divided its logits."
    )


# ---- replies ------------------------------------------------------------------------------------------------------


class ReplayedRollout(BaseModel):
    """`margin` is, for a sampled token, the least distance by which the two uniforms of its draw would have to move, at
    most, to give the recorded one, or how close a filter's edge is whose crossing would give it (mass for top-p, nats
    for top-k and min-p); for a greedy row the gap between its logit and the largest. It is null too where the recorded
    token could not come at all."""

    exact: bool = Field(description="Whether every token is drawn again; only ids count.")
    first_difference: int | None = Field(description="Index in `token_ids`.")
    margin: float | None
    max_abs_logprob_difference: float | None = Field(description="Of `logprobs`; null where none was recorded.")


class ReplayReply(BaseModel):
    rollouts: list[ReplayedRollout]
    base: BaseState
    instance: str


class Divergence(BaseModel):
    """How far a trainer is from the server, with d = trainer − server of each token and w = exp d."""

    tokens: int
    kl: float | None = Field(description="mean(exp(d) − 1 − d)")
    mean_ratio: float | None
    max_ratio: float | None
    ess: float | None = Field(description="(Σw)² / (N·Σw²)")
    max_abs_difference: float | None


class ProbedVersion(BaseModel):
    policy: str
    version: int
    digest: str
    label: str | None
    tokens: int
    recorded: Divergence | None = Field(
        description="Against what the rollouts carry: `logprobs` at temperature 1, else `sampling_logprobs + "
        "log_kept_mass` of rows sampled at this temperature; null where no token has it."
    )
    rescored: Divergence = Field(description="Against a teacher-forced pass now.")


class ProbeReply(BaseModel):
    versions: list[ProbedVersion]
    temperature: float
    base: BaseState
    instance: str
