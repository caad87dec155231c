"""What the request models share: strictness, fields of the contract that are not served yet, one-or-many values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.quoting import quoted

MAX_SEED = MAX_COUNT = 2**53 - 1
UNSUPPORTED = "unsupported_field"
"""Type of the validation error for what the contract knows and this server does not serve yet."""
ID_RULE = "1 to 128 printable ASCII characters without spaces and slashes"
ID_LETTER, ID_LENGTH = "[!-.0-~]", 128
ID = re.compile(f"{ID_LETTER}{{1,{ID_LENGTH}}}")


def unsupported(field: str | int, what: str) -> PydanticCustomError:
    """The error for a known field or value that is not served; `what` follows the place in a sentence, as in every
    error made here: `sampling.logit_bias` + `is not supported …`."""
    return PydanticCustomError(UNSUPPORTED, "{what}", {"field": field, "what": what})


def _same(value: Any, neutral: Any) -> bool:
    numbers = (int, float)
    if isinstance(value, numbers) and isinstance(neutral, numbers) and not isinstance(value, bool):
        return value == neutral
    return type(value) is type(neutral) and value == neutral


class Request(BaseModel):
    """Base of every request body and of its parts. A `null` means that the field is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=False)

    later: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of the contract that are not served yet → values that change nothing and are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_later_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in data.items():
            if name in cls.later:
                if value is not None and not any(_same(value, neutral) for neutral in cls.later[name]):
                    raise unsupported(name, "is not supported by this server yet; leave it out")
            elif value is not None or name not in known:
                kept[name] = value
        return kept


class SamplingNumbers(Request):
    """How to sample, on every route: what `rollout.SamplingParams` takes as it stands, under its name and within its
    domains. What a reply says a row was sampled by has the same fields."""

    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = Field(default=1.0, description="Counts the prompt too.")


# Tags are put in angle brackets so that the place of an error can be written without them.
ONE, MANY = "<one>", "<many>"


def _one_or_many(value: Any) -> str | None:
    if isinstance(value, str):
        return ONE
    return MANY if isinstance(value, list) else None


Piece = Annotated[str, Field(min_length=1)]
OneOrMany = Annotated[
    Annotated[Piece, Tag(ONE)] | Annotated[list[Piece], Tag(MANY)],
    Discriminator(
        _one_or_many, custom_error_type="one_or_many", custom_error_message="must be a string or a list of strings"
    ),
]
"""A string or a list of strings, none of them empty."""

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
"""Checked up to the first wrong one: a list may have millions."""
TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")


def _named_tokens(value: dict[str, float]) -> dict[str, float]:
    for key in value:
        if not TOKEN_KEY.fullmatch(key):
            raise PydanticCustomError("token_key", "has {key}, which is no token id in decimal", {"key": quoted(key)})
    return value


LogitBias = Annotated[dict[str, float], AfterValidator(_named_tokens)]
"""Token id in decimal → what is added to its logit, -100 to 100."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
RequestId = Annotated[str, Field(min_length=1, max_length=ID_LENGTH, pattern=f"^{ID_LETTER}+$")]
"""Printable ASCII without spaces and slashes."""
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Whole = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PolicyText = Annotated[str, Field(min_length=1, max_length=256)]


def stops(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def exactly_one(*names: str) -> dict[str, Any]:
    """For the JSON schema of a body that has one of these fields."""
    return {"oneOf": [{"required": [name]} for name in names]}


def _some_left(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("truncation", "is 0, which leaves nothing to read")
    return value


LastTokens = Annotated[int, Field(ge=-1), AfterValidator(_some_left)]
"""How many of the last tokens are kept; -1 means what the context holds."""
