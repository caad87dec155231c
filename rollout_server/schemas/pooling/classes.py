"""`POST /classify` and `POST /pooling`, after vLLM."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.pooling.inputs import PoolingInput, ScoringUsage, Steps


class ClassifyRequest(PoolingInput):
    """Classes of whole sequences."""


class PoolingRequest(PoolingInput):
    """Whatever a model makes of hidden states."""

    task: Literal["classify", "token_classify", "embed"] | None = Field(
        default=None, description="The model's own, if absent; `embed` for one that generates."
    )
    steps: Steps | None = Field(default=None, description="With `token_classify`: these tokens alone.")
    encoding_format: Literal["float"] = "float"

    @model_validator(mode="after")
    def _steps_of_tokens(self) -> PoolingRequest:
        if self.steps is not None and self.task not in (None, "token_classify"):
            raise PydanticCustomError("steps_task", "go with the task token_classify", {"field": "steps"})
        return self


# ---- replies ------------------------------------------------------------------------------------------------------


class ClassReply(BaseModel):
    """`label` is null where the model only numbers its labels."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassReply]
    usage: ScoringUsage


class PooledReply(BaseModel):
    """One vector, or one for each token."""

    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]]


class PoolingReply(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PooledReply]
    usage: ScoringUsage
