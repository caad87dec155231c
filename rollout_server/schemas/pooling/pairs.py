"""`POST /score` and `POST /rerank`: a query and documents, after vLLM, SGLang and Cohere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import MANY, ONE, OneOrMany, Piece, Request, TokenIds
from rollout_server.schemas.openai.completions import IDS, TEXT, PromptForm
from rollout_server.schemas.pooling.inputs import ScoringRequest, ScoringUsage

FIRST = ("queries", "text_1", "data_1")
SECOND = ("documents", "text_2", "data_2", "items")
"""Names that releases of vLLM have for the two sides of a pair."""


def _query_form(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    return IDS if isinstance(value, list) else None


Query = Annotated[
    Annotated[Piece, Tag(TEXT)] | Annotated[TokenIds, Field(min_length=1), Tag(IDS)],
    Discriminator(
        _query_form, custom_error_type="query_form", custom_error_message="must be a text or a list of token ids"
    ),
]


class ScoreRequest(ScoringRequest):
    """Pairs of texts; or, with `label_token_ids`, a query with each item behind it, and how probable a few tokens are
    as the next one, which any decoder says."""

    queries: OneOrMany | None = None
    text_1: OneOrMany | None = None
    data_1: OneOrMany | None = None
    documents: OneOrMany | None = None
    text_2: OneOrMany | None = None
    data_2: OneOrMany | None = None
    query: Query | None = None
    items: PromptForm | None = None
    label_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    apply_softmax: bool = Field(
        default=False, description="Over these tokens alone; else their probabilities among all."
    )
    item_first: bool = Field(default=False, description="Each item stands in front of the query.")

    @model_validator(mode="after")
    def _one_kind(self) -> ScoreRequest:
        if self.label_token_ids is not None:
            if self.query is None or self.items is None:
                raise PydanticCustomError("score_kind", "needs query and items", {"field": "label_token_ids"})
            self._refuse((*FIRST, *SECOND[:-1]), "does not go with label_token_ids")
            return self
        self._refuse(("query", "apply_softmax", "item_first"), "goes with label_token_ids")
        for names in (FIRST, SECOND):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) != 1:
                raise PydanticCustomError(
                    "score_kind",
                    "must have one of {names}; this one has {found}",
                    {"names": ", ".join(names), "found": " and ".join(given) or "none"},
                )
        return self

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise PydanticCustomError("score_option", "{why}", {"why": why, "field": name})

    @property
    def sides(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """The field and the value of both sides of the pairs."""
        first, second = (next(name for name in names if getattr(self, name) is not None) for names in (FIRST, SECOND))
        return (first, getattr(self, first)), (second, getattr(self, second))


class Document(Request):
    text: Piece


def _document_form(value: Any) -> str | None:
    if isinstance(value, str):
        return ONE
    return MANY if isinstance(value, dict) else None


DocumentForm = Annotated[
    Annotated[Piece, Tag(ONE)] | Annotated[Document, Tag(MANY)],
    Discriminator(
        _document_form, custom_error_type="document_form", custom_error_message="must be a text or an object with text"
    ),
]


class RerankRequest(ScoringRequest):
    """Documents in the order in which they answer a query."""

    query: Piece
    documents: Annotated[list[DocumentForm], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] = Field(default=0, description="So many of the best; 0 for all.")
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


# ---- replies ------------------------------------------------------------------------------------------------------


class PairScore(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class ScoreReply(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: ScoringUsage


class TokenScoreReply(BaseModel):
    """With `label_token_ids`: a list for each item."""

    scores: list[list[float]]
    object: Literal["scoring"]
    model: str
    usage: ScoringUsage


class RankedText(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int
    document: RankedText | None = None
    relevance_score: float


class RerankReply(BaseModel):
    """The best first."""

    id: str
    model: str
    usage: ScoringUsage
    results: list[Ranked]
