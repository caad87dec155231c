"""`POST /v1/chat/completions`: messages in, a message out, for everything that speaks OpenAI."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.errors import InvalidField
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import EventsOperation, failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.choices import Choice, ChoiceOptions, Piece
from rollout_server.http.replies.json_entries import begins_turn, finite, usage
from rollout_server.http.requests.grammars import constraint_of_chat, extra_weight
from rollout_server.http.requests.json_body import StrictJson, beside, read_json
from rollout_server.http.requests.sampling import check_rows, fresh_seed, row_seeds, sampling_params
from rollout_server.http.requests.tokens.pictures import RequestPictures, picture_weight
from rollout_server.http.requests.tokens.prompts import room
from rollout_server.http.requests.tokens.rendering import opens_thinking, render, template_source
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.openai.jobs import OPENAI_WORDS, Job, respond
from rollout_server.http.service import Service, request_id
from rollout_server.rollout import FinishReason, Rollout, RolloutRequest, Wants
from rollout_server.schemas.openai.chat import ChatReply, ChatRequest
from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.chat_parts import Gain, ReplyParts
from rollout_server.text.token_strings import TokenStrings


class ChatChoice(Choice):
    """A choice as this route writes it: reasoning, content and tool calls apart."""

    def __init__(self, job: ChatJob, sample_index: int) -> None:
        super().__init__(sample_index, job.reading, job.groups[0], None)
        self._asked_ids = job.data.return_token_ids
        self._thinks = job.format.has_thinking
        constraint = job.groups[0].sampling.constraint
        self._parts = ReplyParts(
            job.format,
            thinking=job.thinking,
            tools=job.called_tools,
            literal=constraint is not None and constraint.grammar.is_content,
        )

    def whole(self, piece: Piece) -> dict[str, Any]:
        gain = self._read(piece)
        message: dict[str, Any] = {"role": "assistant", "content": gain.content, "refusal": None}
        if not gain.content and (gain.calls or gain.reasoning):
            message["content"] = None
        if gain.reasoning:
            message["reasoning_content"] = gain.reasoning
        if gain.calls:
            message["tool_calls"] = [{name: call[name] for name in call if name != "index"} for call in gain.calls]
        return {"index": self.index, "message": message, **self._ending(piece)}

    def part(self, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        gain = self._read(piece)
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        if gain.content:
            delta["content"] = gain.content
        if gain.reasoning:
            delta["reasoning_content"] = gain.reasoning
        if gain.calls:
            delta["tool_calls"] = gain.calls
        news = gain.content or gain.reasoning or gain.calls or piece.finish_reason
        if news or self.told(piece, token_ids=self._asked_ids):
            return {"index": self.index, "delta": delta, **self._ending(piece)}
        return None

    @property
    def reasoning_tokens(self) -> int | None:
        """Sampled tokens that belong to reasoning, its marks included; None where the model has no marks for it."""
        if not self._thinks:
            return None
        return self.begins_within(self._parts.reasoned)

    def _read(self, piece: Piece) -> Gain:
        if piece.finish_reason is None:
            return self._parts.push(piece.text)
        return self._parts.finish(piece.text, cut=piece.finish_reason != FinishReason.STOP)

    def _ending(self, piece: Piece) -> dict[str, Any]:
        """What a choice and its part in a stream have in common."""
        logprobs = None
        if self._reading.top_logprobs is not None:
            logprobs = {"content": token_entries(piece, self._reading.strings), "refusal": None}
        reason = piece.finish_reason
        if reason == FinishReason.STOP and self._parts.calls:
            reason = "tool_calls"
        entry: dict[str, Any] = {
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": piece.stop_reason,
            "rollout": piece.rollout,
        }
        if self._asked_ids:
            entry["token_ids"] = piece.token_ids
        return entry


def token_entries(piece: Piece, strings: TokenStrings) -> list[dict[str, Any]]:
    """A token and its alternatives, best first."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": strings[id], "logprob": logprob, "bytes": list(strings.utf8(id))}

    return [
        entry(id, logprob) | {"top_logprobs": [entry(other, finite(value)) for other, value in top]}
        for id, logprob, top in zip(piece.scored_ids, piece.logprobs, piece.tops, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ChatJob(Job):
    """A chat completion as the engine gets it, and what the reply needs besides."""

    data: ChatRequest
    format: ReplyFormat
    thinking: bool
    """The prompt ends inside of reasoning."""

    @property
    def called_tools(self) -> list[dict[str, Any]] | None:
        """The tools, if calls of them are to be parsed."""
        return None if self.data.tool_choice == "none" else self.data.tools or None

    def choice(self, prompt_index: int, sample_index: int) -> ChatChoice:
        return ChatChoice(self, sample_index)

    def body(
        self, choices: list[dict[str, Any]], tally: dict[str, Any] | None, *, chunk: bool = False, first: bool = False
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if chunk else "chat.completion",
            "created": self.created,
            "model": self.data.model,
            "choices": choices,
            "usage": tally,
        }
        if self.data.return_token_ids and (first or not chunk):
            body["prompt_token_ids"] = self.groups[0].prompt_ids
        return body

    def tally(self, rollouts: Iterable[Rollout], choices: Iterable[Choice]) -> dict[str, Any]:
        found: dict[str, Any] = dict(usage(rollouts, self.prompt_tokens))
        if self.format.has_thinking:
            counts = [choice.reasoning_tokens or 0 for choice in choices if isinstance(choice, ChatChoice)]
            found["completion_tokens_details"] = {"reasoning_tokens": sum(counts)}
        return found


class ChatController(Controller):
    """OpenAI's chat completions, with vLLM's names for what goes beyond them."""

    path = "/v1/chat/completions"
    guards = (may_infer,)
    tags = ("openai",)

    @post(
        before_request=read_json,
        dto=StrictJson[ChatRequest],
        return_dto=None,
        status_code=200,
        operation_class=EventsOperation,
        summary="Complete a conversation",
        description="Messages are rendered as transformers' `apply_chat_template` does. With `stream`, server-sent "
        "events (`chat.completion.chunk`) that end with `data: [DONE]`.",
        responses={200: ResponseSpec(ChatReply, description="n choices."), **failures()},
    )
    async def complete(self, data: JSONBody[ChatRequest], request: Request[Any, Any, Any]) -> Response[Any]:
        service = residents_of(request).of(data.model)
        with renamed({**OPENAI_WORDS, "max_tokens": data.limit_name}):
            weight = len(await request.body()) + data.n + extra_weight(data, compiles=data.must_call)
            weight += picture_weight(data.messages)
            job = await beside(weight, lambda: plan(data, request, service))
            return await respond(job, request, service)


def plan(data: ChatRequest, request: Request[Any, Any, Any], service: Service) -> ChatJob:
    """Everything that can be wrong with a request is found here, before the engine hears of it."""
    address = service.address(data.model, request, param="model")
    check_rows([data.n], service.config.max_rows_per_request)
    service.check_ids(data.stop_token_ids, "stop_token_ids")
    service.check_bias(data.logit_bias, "logit_bias")
    service.check_top_logprobs(data.top_logprobs or 0, "top_logprobs")
    if data.tools and "tools" not in template_source(service.tokenizer, data.tools):
        raise InvalidField("The chat template of this model has no place for tools.", param="tools")
    shown = RequestPictures(service).in_messages(data.messages, "messages")
    ids = render(data, service.tokenizer, param="", bound=service.bound(), expand=shown.expand)
    limit = room(len(ids), data.limit, service.info.max_model_len, prompt_param="messages", param=data.limit_name)
    format, ends = service.reply_format, service.info.eos_token_ids
    thinking = opens_thinking(data, service.tokenizer, format)
    constraint = constraint_of_chat(data, format, service, thinking=thinking)
    id = request_id(None, request, kind="chatcmpl")
    seed = fresh_seed() if data.seed is None else data.seed
    sampling = sampling_params(data, limit, constraint)
    group = RolloutRequest(
        id=id,
        prompt_ids=tuple(ids),
        sampling=sampling,
        policy=address,
        n=data.n,
        seeds=row_seeds(seed, None, 0, data.n),
        wants=Wants(top_logprobs=data.top_logprobs or 0, tokens_as_they_come=data.stream),
        continues=not begins_turn(data, sampling),
        pictures=shown.pictures,
        shown=format.shown(tools=bool(data.tools) and data.tool_choice != "none"),
    )
    reading = ChoiceOptions(
        service.tokenizer,
        service.token_strings,
        ends,
        top_logprobs=(data.top_logprobs or 0) if data.logprobs else None,
        logprobs_mode=data.logprobs_mode,
        include_stop=data.include_stop_str_in_output,
    )
    return ChatJob(
        id=id,
        created=int(time.time()),
        groups=[group],
        reading=reading,
        include_usage=data.stream_options is not None and data.stream_options.include_usage,
        stream=data.stream,
        data=data,
        format=format,
        thinking=thinking,
    )
