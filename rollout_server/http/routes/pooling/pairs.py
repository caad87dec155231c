"""`POST /score` and `POST /rerank`: how well texts answer to a query."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.errors import InvalidField
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.replies.json_entries import json_response, policy_headers
from rollout_server.http.replies.streaming import GoOn, beside_client
from rollout_server.http.requests.json_body import StrictJson, read_json
from rollout_server.http.requests.tokens.prompts import PromptTokens, encode, some
from rollout_server.http.requests.tokens.truncation import bound_of, fitted, fitted_text, read_text
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.pooling.answers import embedded, envelope, labelled, unit_vectors, usage_of
from rollout_server.http.routes.pooling.inputs import Asked, asked_model
from rollout_server.http.service import Service, header_id
from rollout_server.quoting import counted
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion
from rollout_server.schemas.pooling.inputs import ScoringRequest
from rollout_server.schemas.pooling.pairs import (
    RerankReply,
    RerankRequest,
    ScoreReply,
    ScoreRequest,
    TokenScoreReply,
)

MOST_DOCUMENTS = 4096
"""In one request: more are a data set, to be sent in parts."""
NO_ORDER = "only one can be an order: ask /classify"
Pair = tuple[tuple[str, str], tuple[str, str]]
"""Two texts, each with its place in the request."""
Ids = tuple[int, ...]


class PairsController(Controller):
    """Models with one label by that, models that give vectors by the angle between them."""

    path = "/"
    guards = (may_infer,)
    tags = ("pooling",)

    @post(
        ["/score", "/v1/score"],
        before_request=read_json,
        dto=StrictJson[ScoreRequest],
        return_dto=None,
        status_code=200,
        summary="Scores of pairs",
        description="A model with one label reads both texts of a pair together, as its tokenizer joins pairs; of one "
        "that gives vectors the score is their cosine. With `label_token_ids`: how probable these tokens are behind "
        "the query and each item, under any decoder.",
        responses={
            200: ResponseSpec(
                ScoreReply | TokenScoreReply,  # type: ignore[arg-type]
                description="A score for each pair, or with `label_token_ids` a list for each item.",
            ),
            **failures(),
        },
    )
    async def score(self, data: JSONBody[ScoreRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        header_id(request)
        if data.label_token_ids is not None:
            return await token_scores(data, request, residents.of(data.model))
        asked = asked_model(data.model, request, residents, ("classify", "embed"), 1)
        pairs = pairs_of(data)
        version, scores, read = await scored(data, pairs, request, asked)
        entries = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        content = {**envelope("score", asked.name), "data": entries, "usage": usage_of(read)}
        return json_response(content, headers=policy_headers([version]))

    @post(
        ["/rerank", "/v1/rerank", "/v2/rerank"],
        before_request=read_json,
        dto=StrictJson[RerankRequest],
        return_dto=None,
        status_code=200,
        summary="Documents, the best answer first",
        responses={200: ResponseSpec(RerankReply, description="The best first."), **failures()},
    )
    async def rerank(self, data: JSONBody[RerankRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        header_id(request)
        asked = asked_model(data.model, request, residents_of(request), ("classify", "embed"), 1)
        check_count(len(data.documents), "documents")
        query = (data.query, "query")
        pairs = [(query, (text, f"documents[{index}]")) for index, text in enumerate(data.texts)]
        version, scores, read = await scored(data, pairs, request, asked)
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        results = [
            {
                "index": index,
                **({"document": {"text": data.texts[index]}} if data.return_documents else {}),
                "relevance_score": scores[index],
            }
            for index in order[: data.top_n or None]
        ]
        content = {
            "id": f"rerank-{secrets.token_hex(12)}",
            "model": asked.name,
            "usage": usage_of(read),
            "results": results,
        }
        return json_response(content, headers=policy_headers([version]))


def pairs_of(data: ScoreRequest) -> list[Pair]:
    """One text for each of the others, or one for one."""
    (name, given), (other, more) = data.sides
    first, second = _texts(given, name), _texts(more, other)
    check_count(max(len(first), len(second)), other)
    if len(first) not in (1, len(second)):
        raise InvalidField(
            f"{name} has {counted(len(first), 'text')} and {other} {counted(len(second), 'text')}: send one {name}, or "
            "as many as there are others.",
            param=name,
        )
    return list(zip(first * (len(second) // len(first)), second, strict=True))


def _texts(given: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(given, str):
        return [(given, name)]
    if not given or not all(isinstance(text, str) and text for text in given):
        raise InvalidField(f"{name} must be a text, or a list of texts that are not empty.", param=name)
    return [(text, f"{name}[{index}]") for index, text in enumerate(given)]


def check_count(count: int, param: str) -> None:
    if count > MOST_DOCUMENTS:
        raise InvalidField(
            f"{param} has {counted(count, 'text')}; at most {MOST_DOCUMENTS} are scored in one request: send them in "
            "parts.",
            param=param,
        )


async def scored(
    data: ScoringRequest, pairs: Sequence[Pair], request: Request[Any, Any, Any], asked: Asked
) -> tuple[PolicyVersion, list[float], list[Ids]]:
    """(Version, a score for each pair, what was read for them)."""
    asked.require("classify", "embed")
    service = asked.service
    weight = len(await request.body())
    if asked.task == "classify":
        asked.require_one_label(NO_ORDER)
        read = await beside_client(request, weight, lambda go_on: joined(data, pairs, service, go_on))
        sequences, types = [ids for ids, _ in read], [kinds for _, kinds in read]
        found = await labelled(request, service, asked.address, sequences, types=types)
        asked.require_one_label(NO_ORDER, len(found.labels))
        return found.version, [float(scores[0, 0]) for scores in found.probabilities(data.activates)], sequences
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    sequences = await beside_client(request, weight, lambda go_on: alone(data, texts, service, go_on))
    version, states = await embedded(request, service, asked.address, sequences)
    vectors = dict(zip(texts, unit_vectors(states), strict=True))
    return version, [float(np.dot(vectors[one], vectors[other])) for one, other in pairs], sequences


def joined(data: ScoringRequest, pairs: Sequence[Pair], service: Service, go_on: GoOn) -> list[tuple[Ids, Ids]]:
    """Both texts of each pair in one sequence, as the tokenizer joins pairs, and the types of its tokens."""
    bound, tokenizer = bound_of(data, service, go_on), service.tokenizer
    found = []
    for (one, place), (other, where) in pairs:
        for text, at in ((one, place), (other, where)):
            bound.check(tokenizer, text, at)
        found.append(fitted_text(one, other, where, data, service))
    return found


def alone(data: ScoringRequest, texts: Sequence[tuple[str, str]], service: Service, go_on: GoOn) -> list[Ids]:
    bound, tokenizer = bound_of(data, service, go_on), service.tokenizer
    found = []
    for text, place in texts:
        ids = encode(tokenizer, text, add_special_tokens=True, param=place, bound=bound)
        found.append(read_text(PromptTokens(ids, text), place, data, service))
    return found


# ---- tokens as labels ---------------------------------------------------------------------------------------------


async def token_scores(data: ScoreRequest, request: Request[Any, Any, Any], service: Service) -> Response[bytes]:
    """How probable a few tokens are behind the query and each item."""
    name = data.model or BASE
    address = PolicyAddress(BASE) if data.model is None else service.address(data.model, request, param="model")
    ids = data.label_token_ids or []
    service.check_ids(ids, "label_token_ids")
    sequences = await beside_client(request, len(await request.body()), lambda go_on: with_items(data, service, go_on))
    places = [(len(sequence) - 1,) for sequence in sequences]
    found = await labelled(request, service, address, sequences, places, ids)
    rows = found.probabilities(True) if data.apply_softmax else tuple(np.exp(scores) for scores in found.scores)
    content = {
        "scores": [row[0].tolist() for row in rows],
        "object": "scoring",
        "model": name,
        "usage": usage_of(sequences),
    }
    return json_response(content, headers=policy_headers([found.version]))


def with_items(data: ScoreRequest, service: Service, go_on: GoOn) -> list[Ids]:
    """Texts are put together before they are tokenized, ids as they are."""
    query, items = data.query, data.items
    listed: list[Any] = (
        [items] if isinstance(items, str) or (items and isinstance(items[0], int)) else list(items or ())
    )
    if not listed:
        raise InvalidField("items is empty: send at least one.", param="items")
    check_count(len(listed), "items")
    bound, tokenizer = bound_of(data, service, go_on), service.tokenizer
    found = []
    for index, item in enumerate(listed):
        place = f"items[{index}]"
        if isinstance(item, str) != isinstance(query, str):
            raise InvalidField(f"{place} and query have to be both texts, or both token ids.", param=place)
        whole = item + query if data.item_first else query + item
        if isinstance(whole, str):
            whole = encode(tokenizer, whole, add_special_tokens=True, param=place, bound=bound)
        found.append(fitted(some(whole, place), place, data, service))
    return found
