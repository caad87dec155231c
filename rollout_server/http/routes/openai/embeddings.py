"""`POST /v1/embeddings`: pooled hidden states of the resident model, under any version."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.messages.options import Embedding
from rollout_server.engine.messages.scoring import Embed, Embedded
from rollout_server.errors import InvalidField
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.json_entries import json_response, policy_headers
from rollout_server.http.replies.streaming import GoOn, beside_client, while_connected
from rollout_server.http.requests.json_body import StrictJson, beside, read_json
from rollout_server.http.requests.sampling import check_rows
from rollout_server.http.requests.tokens.prompts import how_many, prompts_of
from rollout_server.http.requests.tokens.truncation import bound_of, read_text
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.openai.jobs import OPENAI_WORDS
from rollout_server.http.service import Service, header_id
from rollout_server.quoting import quoted
from rollout_server.schemas.openai.embeddings import EmbeddingsReply, EmbeddingsRequest


class EmbeddingsController(Controller):
    """OpenAI's embeddings."""

    path = "/v1/embeddings"
    guards = (may_infer,)
    tags = ("openai",)

    @post(
        before_request=read_json,
        dto=StrictJson[EmbeddingsRequest],
        return_dto=None,
        status_code=200,
        summary="Embed texts",
        description="Hidden states after the final norm, pooled as the model's sentence-transformers files say; where "
        "there are none, at the last token of a decoder, and by the mean of an encoder's.",
        responses={200: ResponseSpec(EmbeddingsReply, description="A vector for each input."), **failures()},
    )
    async def embed(self, data: JSONBody[EmbeddingsRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = residents_of(request).of(data.model)
        with renamed(OPENAI_WORDS):
            address = service.address(data.model, request, param="model")
            header_id(request)
            sequences = await beside_client(
                request, len(await request.body()), lambda go_on: read_inputs(data, service, go_on)
            )
            embed = Embed(service.engine.new_id("embed"), address, sequences)
            embedded = await while_connected(request, service.engine.embed(embed))
        how = service.info.embedding
        return await beside(len(sequences) * how.width, lambda: reply(data, sequences, embedded, how))


def read_inputs(data: EmbeddingsRequest, service: Service, go_on: GoOn) -> tuple[tuple[int, ...], ...]:
    """Token ids of every input, checked; what is wrong is named by its place."""
    how = service.info.embedding
    if how.refusal:
        raise InvalidField(how.refusal, param="model")
    if data.dimensions is not None and data.dimensions > how.width:
        raise InvalidField(
            f"dimensions is {quoted(data.dimensions)}, but this model's embeddings have {how.width}.",
            param="dimensions",
        )
    check_rows([how_many(data.input)], service.config.max_rows_per_request, ["input"])
    bound = bound_of(data, service, go_on)
    found = prompts_of(data.input, service.tokenizer, param="input", bound=bound)
    return tuple(read_text(prompt, place, data, service) for prompt, place in found)


def reply(
    data: EmbeddingsRequest, sequences: tuple[tuple[int, ...], ...], embedded: Embedded, how: Embedding
) -> Response[bytes]:
    tokens = sum(map(len, sequences))
    pooled = np.frombuffer(b"".join(embedded.vectors), dtype="<f4").reshape(len(sequences), how.width)
    vectors = finished(pooled, data.dimensions, normalise=how.normalise)
    encoded = (
        [base64.b64encode(vector.tobytes()).decode("ascii") for vector in vectors]
        if data.encoding_format == "base64"
        else vectors.tolist()
    )
    content = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(encoded)],
        "model": data.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return json_response(content, headers=policy_headers([embedded.version]))


def finished(pooled: np.ndarray, dimensions: int | None, *, normalise: bool) -> np.ndarray:
    """Pooled states [N, width] → what is sent, little-endian float32 [N, dimensions]. A zero vector stays zero."""
    cut = pooled[:, :dimensions].astype(np.float64)
    if normalise or dimensions is not None:
        cut = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return cut.astype("<f4")
