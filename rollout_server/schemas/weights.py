"""`/v1/weights`: options of a push, and what is said of versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import Count, Request
from rollout_server.schemas.rollouts import BaseState


class WeightsOptions(Request):
    """Form fields or query parameters of a push: text, so booleans are the words `true` and `false`."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The model that it is a version of, by its name among several; None for that of --model."""
    format: Literal["auto", "peft", "mlx"] = "auto"
    activate: Literal["true", "false"] = "true"
    mode: Literal["adapter", "merged"] | None = None
    """None for the usual way of the kind, which is `merged` for dense versions."""
    dequantize: Literal["true", "false"] = "false"
    label: Annotated[str, Field(max_length=64)] | None = None

    @field_validator("label")
    @classmethod
    def _on_one_line(cls, value: str) -> str:
        # It is shown in logs and tables.
        if not value.isprintable():
            raise PydanticCustomError("label", "must be printable characters on one line")
        return value


class ActivateRequest(Request):
    version: Count


class PinRequest(Request):
    pinned: bool


# ---- replies ------------------------------------------------------------------------------------------------------


class ModuleReport(BaseModel):
    module: str
    delta_norm: float
    effective_rank: float | None


class PushReport(BaseModel):
    """`delta_norm` is the Frobenius norm of all ΔW = W' − W together: DoRA's magnitudes count, and tensors in place of
    the base's are compared with these. A zero module changes nothing: B starts at zero, and DoRA's magnitudes at ‖W‖,
    of which less than 1e-5 is rounding. `effective_rank` is exp of the entropy of the singular values of B · A, the
    mean over modules where that is not zero. `dense` counts whole tensors. `bytes` are those of the file's tensors,
    `resident_bytes` what the version takes of the device's memory: its parameter set, and one slot of the stacks."""

    modules: int
    dense: int
    delta_norm: float | None
    effective_rank: float | None
    largest_modules: list[ModuleReport]
    zero_modules: list[str]
    bytes: int
    resident_bytes: int


@dataclass
class PushTimings:
    """Milliseconds. No pydantic model, in which `validate` would be a method. `persist`: writing to the state
    directory, where there is one."""

    receive: float
    validate: float
    stage: float
    activate: float
    persist: float | None = None


class PushReply(BaseModel):
    """A version, live or not. `unchanged`: the same weights were already there."""

    name: str
    version: int
    digest: str
    label: str | None
    kind: str
    mode: str
    rank: int
    live: bool
    unchanged: bool
    base: BaseState
    bytes: int
    instance: str
    report: PushReport
    timings_ms: PushTimings


class ActivateTimings(BaseModel):
    """Milliseconds."""

    activate: float


class KeptVersion(BaseModel):
    version: int
    digest: str
    label: str | None
    kind: str
    mode: str
    live: bool
    pinned: bool
    rows_in_use: int
    bytes: int
    resident_bytes: int = Field(description="Device memory: its parameter set, and one slot of the stacks.")
    created: float = Field(description="Unix time, seconds.")
    task: Literal["classify", "token_classify"] | None = Field(
        description="What its own head scores; null where it has none, and does what the base does."
    )
    labels: int = Field(description="How many its own head scores.")


class PinReply(KeptVersion):
    name: str
    base: BaseState
    instance: str


class DeleteReply(BaseModel):
    """Version numbers that are gone from now on. `rows_in_use` still run on them and keep their memory."""

    name: str
    deleted: list[int]
    rows_in_use: int
    base: BaseState
    instance: str


class PolicyReply(BaseModel):
    name: str
    live: int | None
    versions: list[KeptVersion]


class OnePolicyReply(PolicyReply):
    base: BaseState
    instance: str


class ActivateReply(BaseModel):
    """The version the alias points to. `unchanged`: it was there already."""

    name: str
    version: int
    digest: str
    label: str | None
    live: bool
    unchanged: bool
    base: BaseState
    instance: str
    timings_ms: ActivateTimings


class PoliciesReply(BaseModel):
    policies: list[PolicyReply]
    base: BaseState
    instance: str
