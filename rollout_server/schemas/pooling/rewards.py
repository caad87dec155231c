"""`POST /v1/rewards`, and the door of OpenRLHF's trainers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import PolicyText, Request, TokenIds, exactly_one
from rollout_server.schemas.messages import ImageUrls
from rollout_server.schemas.pooling.inputs import Conversation, ScoringUsage, Steps, check_conversation


class SequenceToReward(Conversation):
    """Exactly one of `token_ids`, `text` and `messages`."""

    model_config = ConfigDict(json_schema_extra=exactly_one("token_ids", "text", "messages"))

    token_ids: TokenIds | None = None
    text: str | None = None
    images: ImageUrls | None = None
    add_special_tokens: bool = Field(default=True, description="Of `text`.")

    @model_validator(mode="after")
    def _one_kind(self) -> SequenceToReward:
        check_conversation(self, ("token_ids", "text"))
        if self.images is not None and self.token_ids is None:
            raise PydanticCustomError("prompt_option", "goes with token_ids", {"field": "images"})
        return self


class RewardsRequest(Request):
    model: PolicyText | None = Field(
        default=None,
        description="The base's id, `base`, NAME, NAME@7 or NAME@sha256:…; the one that scores, if absent.",
    )
    sequences: Annotated[list[SequenceToReward], Field(min_length=1)]
    steps: Steps | None = Field(
        default=None, description="Scores at these tokens; a model that scores tokens needs to be told which."
    )
    label_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = Field(
        default=None,
        description="Labels are these tokens, and their scores are log-probabilities of being the next one: what a "
        "decoder without a head says.",
    )
    activation: Literal["none", "model"] = Field(
        default="none",
        description="`none` for the numbers that the head gives; `model` for what /classify makes of them, and of "
        "`label_token_ids` a softmax.",
    )


class GetRewardRequest(Request):
    """OpenRLHF's remote reward model."""

    query: Annotated[list[str], Field(min_length=1)]
    prompts: Any = Field(default=None, description="Sent along by OpenRLHF; not read.")
    labels: Any = Field(default=None, description="Likewise.")
    model: PolicyText | None = Field(default=None, description="The one that gives a reward, if absent.")


# ---- replies ------------------------------------------------------------------------------------------------------


class Reward(BaseModel):
    """`value` is the score of the only label, and null where there are several. `scores` is null where only steps were
    read, and `steps` where none were asked for. `tokens` counts what was read."""

    value: float | None
    scores: list[float] | None
    steps: list[list[float]] | None
    tokens: int


class RewardsReply(BaseModel):
    rewards: list[Reward]
    labels: list[str | None]
    policy: str
    version: int
    digest: str
    instance: str
    usage: ScoringUsage


class GetRewardReply(BaseModel):
    rewards: list[float]
