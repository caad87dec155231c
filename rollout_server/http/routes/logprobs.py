"""`POST /v1/logprobs`: log-probabilities of given tokens, teacher-forced."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.messages.scoring import Pictures, Score
from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.replies.json_entries import json_response, span_entry, version_entry
from rollout_server.http.replies.safetensors_file import binary_response, scores_file
from rollout_server.http.replies.streaming import while_connected
from rollout_server.http.requests.json_body import StrictJson, beside, read_json, wants_binary
from rollout_server.http.requests.spans import read_spans
from rollout_server.http.requests.tokens.pictures import RequestPictures, picture_weight
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service, header_id
from rollout_server.quoting import counted, quoted
from rollout_server.schemas.logprobs import LogprobsReply, LogprobsRequest


class LogprobsController(Controller):
    """Teacher forcing."""

    path = "/v1/logprobs"
    guards = (may_infer,)
    tags = ("logprobs",)

    @post(
        before_request=read_json,
        dto=StrictJson[LogprobsRequest],
        return_dto=None,
        status_code=200,
        summary="Score given tokens",
        description="Values for positions `start…` of every sequence; position 0 is null.",
        responses={
            200: ResponseSpec(LogprobsReply, description="Sequences in the order of the request."),
            **failures(),
        },
    )
    async def score(self, data: JSONBody[LogprobsRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = residents_of(request).of(data.policy)
        binary = wants_binary(request)
        address = service.address(data.policy, request, param="policy")
        header_id(request)
        weight = len(await request.body()) + sum(picture_weight(None, sequence.images) for sequence in data.sequences)
        pictures = await beside(weight, lambda: check(data, service))
        spans = tuple(
            read_spans(sequence, f"sequences[{index}]", request, service)
            for index, sequence in enumerate(data.sequences)
        )
        scored = await while_connected(
            request,
            service.engine.score(
                Score(
                    id=service.engine.new_id("score"),
                    policy=address,
                    sequences=tuple(tuple(sequence.token_ids) for sequence in data.sequences),
                    starts=tuple(sequence.start for sequence in data.sequences),
                    temperature=data.temperature,
                    entropy="entropy" in data.returns,
                    top_logprobs=data.top_logprobs,
                    spans=spans,
                    pictures=pictures,
                )
            ),
        )
        used = dict.fromkeys(span.version for sequence in scored.sequences for span in sequence.spans)
        content = {
            "sequences": [
                {
                    "logprobs": sequence.logprobs,
                    "versions": [span_entry(span) for span in sequence.spans],
                    "entropy": sequence.entropy if "entropy" in data.returns else None,
                    "top_logprobs": sequence.top_logprobs if data.top_logprobs else None,
                }
                for sequence in scored.sequences
            ],
            "policy": service.policy_state(address),
            "versions": [version_entry(version) for version in used],
            "temperature": scored.temperature,
            "base": service.base,
            "instance": service.instance,
        }
        weight = sum(len(sequence.logprobs) for sequence in scored.sequences)
        encode = (lambda: binary_response(scores_file(content))) if binary else (lambda: json_response(content))
        return await beside(weight, encode)


def check(data: LogprobsRequest, service: Service) -> Pictures:
    """Lengths and vocabulary, with the place of what is wrong; returns the pictures of each sequence."""
    service.check_top_logprobs(data.top_logprobs, "top_logprobs")
    context = service.info.max_model_len
    for index, sequence in enumerate(data.sequences):
        place = f"sequences[{index}]"
        count = len(sequence.token_ids)
        service.check_ids(sequence.token_ids, f"{place}.token_ids")
        if count > context:
            raise ContextExceeded(
                f"{place} has {counted(count, 'token')}; the context holds {context}.", param=f"{place}.token_ids"
            )
        if sequence.start >= count:
            raise InvalidField(
                f"{place}.start is {quoted(sequence.start)}, but the sequence has {counted(count, 'token')}.",
                param=f"{place}.start",
            )
    if all(sequence.images is None for sequence in data.sequences):
        return ()
    pictures = RequestPictures(service)
    return tuple(
        pictures.beside_ids(sequence.images, f"sequences[{index}].images").pictures
        for index, sequence in enumerate(data.sequences)
    )
