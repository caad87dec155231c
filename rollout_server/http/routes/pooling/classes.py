"""`POST /classify` and `POST /pooling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.replies.json_entries import json_response, policy_headers
from rollout_server.http.replies.streaming import beside_client
from rollout_server.http.requests.json_body import StrictJson, beside, read_json
from rollout_server.http.requests.tokens.rendering import rendered
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.pooling.answers import embedded, envelope, labelled, unit_vectors, usage_of
from rollout_server.http.routes.pooling.inputs import Asked, asked_model, read_inputs, scoring_model
from rollout_server.http.routes.pooling.steps import SentText, step_positions
from rollout_server.http.service import SCORING, Service, header_id
from rollout_server.rollout import PolicyVersion
from rollout_server.schemas.pooling.classes import ClassifyReply, ClassifyRequest, PoolingReply, PoolingRequest


class ClassesController(Controller):
    """What vLLM serves of classifiers and reward models."""

    path = "/"
    guards = (may_infer,)
    tags = ("pooling",)

    @post(
        ["/classify", "/v1/classify"],
        before_request=read_json,
        dto=StrictJson[ClassifyRequest],
        return_dto=None,
        status_code=200,
        summary="Classes of sequences",
        description="Label scores at the rightmost token that is not the pad token, as probabilities unless "
        "`use_activation` is false.",
        responses={200: ResponseSpec(ClassifyReply, description="An entry for each input."), **failures()},
    )
    async def classify(self, data: JSONBody[ClassifyRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        asked = scoring_model(data.model, request, residents_of(request), ("classify",))
        service = asked.service
        header_id(request)
        sequences = await beside_client(
            request, len(await request.body()), lambda go_on: read_inputs(data, service, go_on)
        )
        found = await labelled(request, service, asked.address, sequences)
        rows = [scores[0] for scores in found.probabilities(data.activates)]
        entries = [
            {
                "index": index,
                "label": found.labels[int(np.argmax(row))],
                "probs": row.tolist(),
                "num_classes": len(row),
            }
            for index, row in enumerate(rows)
        ]
        content = {**envelope("classify", asked.name), "data": entries, "usage": usage_of(sequences)}
        return json_response(content, headers=policy_headers([found.version]))

    @post(
        "/pooling",
        before_request=read_json,
        dto=StrictJson[PoolingRequest],
        return_dto=None,
        status_code=200,
        summary="What a model makes of hidden states",
        description="Class scores of sequences, of each of their tokens, or vectors.",
        responses={200: ResponseSpec(PoolingReply, description="An entry for each input."), **failures()},
    )
    async def pooling(self, data: JSONBody[PoolingRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        asked = asked_model(data.model, request, residents_of(request), (*SCORING, "embed"))
        service = asked.service
        own = "embed" if asked.task == "generate" else asked.task
        task = data.task or (own if data.steps is None else "token_classify")
        header_id(request)
        sequences = await beside_client(
            request, len(await request.body()), lambda go_on: read_inputs(data, service, go_on)
        )
        if task == "embed":
            version, states = await embedded(request, service, asked.address, sequences)
            normalise = service.info.embedding.normalise and data.activates
            vectors = (unit_vectors(states) if normalise else states).astype("<f4").tolist()
        else:
            version, vectors = await classified(data, request, service, asked, sequences, task)
        entries = [{"index": index, "object": "pooling", "data": vector} for index, vector in enumerate(vectors)]
        content = {**envelope("pool", asked.name), "data": entries, "usage": usage_of(sequences)}
        weight = sum(map(len, sequences))
        return await beside(weight, lambda: json_response(content, headers=policy_headers([version])))


Pooled = tuple[PolicyVersion, list[Any]]


async def classified(
    data: PoolingRequest,
    request: Request[Any, Any, Any],
    service: Service,
    asked: Asked,
    sequences: Sequence[tuple[int, ...]],
    task: str,
) -> Pooled:
    """[labels] of each sequence, or [positions, labels] where tokens are scored."""
    asked.require(*SCORING)
    if task == "classify":
        asked.require("classify")
        found = await labelled(request, service, asked.address, sequences)
        return found.version, [scores[0].tolist() for scores in found.probabilities(data.activates)]
    if service.info.encoder:
        # Its head reads more than the states of one token.
        asked.require("token_classify")
    weight = len(await request.body())
    places = await beside_client(request, weight, lambda _: places_of(data, sequences, service))
    found = await labelled(request, service, asked.address, sequences, places)
    return found.version, [scores.tolist() for scores in found.probabilities(data.activates)]


def places_of(data: PoolingRequest, sequences: Sequence[tuple[int, ...]], service: Service) -> list[tuple[int, ...]]:
    """The tokens that are scored: the steps, or without them all."""
    if data.steps is None:
        return [tuple(range(len(ids))) for ids in sequences]
    if data.messages is not None and data.steps.text is not None:
        text = rendered(data, service.tokenizer, param="")
        return step_positions(data.steps, sequences, [SentText(text, special=False)], service)
    inputs: list[Any] = data.input if isinstance(data.input, list) else [data.input]
    if len(inputs) != len(sequences):  # Token ids of one sequence.
        inputs = [None] * len(sequences)
    sent = [SentText(each, data.add_special_tokens) if isinstance(each, str) else None for each in inputs]
    return step_positions(data.steps, sequences, sent, service)
