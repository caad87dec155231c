"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the served tokenizer, for clients that have none."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import ModelOperation, failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.json_entries import json_response
from rollout_server.http.requests.json_body import StrictJson, beside, read_json
from rollout_server.http.requests.queries import asked_resident
from rollout_server.http.requests.tokens.rendering import render
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service
from rollout_server.rollout import BASE
from rollout_server.schemas.vllm.tokenizer import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfoReply,
)
from rollout_server.text.long_texts import CharacterBound

MOST_CHARACTERS = 2_097_152
"""A text may have at least so many characters: whatever the context, a file may be counted."""
CHARACTERS_OF_A_TOKEN = 16
"""More than a token has in any language, so that a text which fits the context can be counted."""


class TokensController(Controller):
    """Text to ids and back, as every other route does it."""

    path = "/"
    guards = (may_infer,)
    tags = ("tokens",)

    @post(
        "/tokenize",
        before_request=read_json,
        dto=StrictJson[TokenizeRequest],
        return_dto=None,
        status_code=200,
        summary="Token ids of a prompt or of messages",
        responses={200: ResponseSpec(TokenizeReply, description="The ids that the model would read."), **failures()},
    )
    async def tokenize(self, data: JSONBody[TokenizeRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = residents_of(request).of(data.model)
        check_model(data.model, request, service)
        return await beside(len(await request.body()), lambda: tokens_reply(data, service))

    @post(
        "/detokenize",
        before_request=read_json,
        dto=StrictJson[DetokenizeRequest],
        return_dto=None,
        status_code=200,
        summary="Text of token ids",
        responses={200: ResponseSpec(DetokenizeReply, description="The text, special tokens included."), **failures()},
    )
    async def detokenize(self, data: JSONBody[DetokenizeRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = residents_of(request).of(data.model)
        check_model(data.model, request, service)
        service.check_ids(data.tokens, "tokens")
        return await beside(len(await request.body()), lambda: json_response({"prompt": decoded(data.tokens, service)}))

    @get(
        "/tokenizer_info",
        operation_class=ModelOperation,
        summary="Special tokens and the chat template",
        responses={200: ResponseSpec(TokenizerInfoReply, description="What the served tokenizer has."), **failures()},
    )
    async def tokenizer_info(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        service = asked_resident(request)
        tokenizer = service.tokenizer
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        return json_response(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "unk_token": tokenizer.unk_token,
                "additional_special_tokens": [token for token in tokenizer.all_special_tokens if token not in named],
                "chat_template": tokenizer.chat_template,
                "model_max_length": service.info.max_model_len,
                "vocab_size": len(tokenizer),
            }
        )


def check_model(model: str | None, request: Request[Any, Any, Any], service: Service) -> None:
    """A name that is not served is refused, though all policies share the tokenizer."""
    if model is not None:
        address = service.address(model, request, param="model")
        if address.name != BASE:
            with renamed({"name": "model"}):
                service.policy(address.name)


def tokens_reply(data: TokenizeRequest, service: Service) -> Response[bytes]:
    tokenizer = service.tokenizer
    bound = CharacterBound(max(MOST_CHARACTERS, CHARACTERS_OF_A_TOKEN * service.info.max_model_len))
    if data.prompt is None:
        ids = render(data, tokenizer, param="", bound=bound)
    else:
        bound.check(tokenizer, data.prompt, "prompt")
        ids = tokenizer.encode(data.prompt, add_special_tokens=data.add_special_tokens is not False)
    return json_response(
        {
            "count": len(ids),
            "max_model_len": service.info.max_model_len,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids) if data.return_token_strs else None,
        }
    )


def decoded(ids: list[int], service: Service) -> str:
    return str(service.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
