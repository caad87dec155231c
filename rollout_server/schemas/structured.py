"""What the text of a reply has to match: OpenAI's `response_format`, and `structured_outputs` as vLLM names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import Request, exactly_one

KINDS = ("json", "regex", "choice", "grammar", "json_object")


OBJECT, TEXT = "<object>", "<text>"


def _schema_form(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    return OBJECT if isinstance(value, dict) else None


SchemaForm = Annotated[
    Annotated[dict[str, Any], Tag(OBJECT)] | Annotated[str, Tag(TEXT)],
    Discriminator(
        _schema_form, custom_error_type="schema_form", custom_error_message="must be a JSON schema, or its text"
    ),
]


class SchemaOfReply(Request):
    name: str | None = Field(default=None, description="Changes nothing.")
    description: str | None = Field(default=None, description="Changes nothing.")
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema; it is always kept to.")
    strict: bool | None = Field(default=None, description="Changes nothing.")


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaOfReply | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            what = "is required" if self.json_schema is None else 'goes with "type": "json_schema" only'
            raise PydanticCustomError("response_format", "{what}", {"field": "json_schema", "what": what})
        return self


class StructuredOutputs(Request):
    """Exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`."""

    model_config = ConfigDict(json_schema_extra=exactly_one(*KINDS))

    json_: SchemaForm | None = Field(default=None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = Field(default=None, description="GBNF, or Lark as llguidance reads it.")
    json_object: bool | None = Field(default=None, description="true: any JSON object.")
    disable_any_whitespace: bool = Field(default=False, description="None between the parts of JSON.")
    whitespace_pattern: str | None = Field(
        default=None,
        description="A regex for what may stand between the parts of JSON; at most 40 characters, if absent.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> StructuredOutputs:
        given = [name for name in KINDS if getattr(self, "json_" if name == "json" else name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise PydanticCustomError(
                "structured_kind",
                "must have one of json, regex, choice, grammar and json_object; this one has {found}",
                {"found": found},
            )
        if self.json_object is False:
            raise PydanticCustomError("json_object", "must be true, or left out", {"field": "json_object"})
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            if getattr(self, name) and given[0] not in ("json", "json_object"):
                raise PydanticCustomError("whitespace", "is about JSON only", {"field": name})
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise PydanticCustomError(
                "whitespace", "contradicts disable_any_whitespace", {"field": "whitespace_pattern"}
            )
        return self


class Structured(Request):
    """The fields of a request that says what a reply has to match."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _one_grammar(self) -> Structured:
        if self._formatted and self.structured_outputs is not None:
            raise PydanticCustomError(
                "structured", "is there beside response_format; give one of them", {"field": "structured_outputs"}
            )
        return self

    @property
    def _formatted(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def constrained(self) -> bool:
        return self._formatted or self.structured_outputs is not None


class EffectiveStructure(BaseModel):
    """`structured_outputs` as it took effect; null where the text was free."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
