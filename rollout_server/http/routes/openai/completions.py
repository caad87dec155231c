"""`POST /v1/completions`: the OpenAI route, for evaluation tools."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.messages.scoring import Score, Scored
from rollout_server.errors import ContextExceeded
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import EventsOperation, failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.choices import Choice, ChoiceOptions, Echo, Piece
from rollout_server.http.replies.json_entries import finite, json_response, policy_headers, usage
from rollout_server.http.replies.streaming import SSE, GoOn, beside_client, sse_event, stream, while_connected
from rollout_server.http.requests.grammars import constraint_of, extra_weight
from rollout_server.http.requests.json_body import StrictJson, beside, read_json
from rollout_server.http.requests.sampling import check_rows, fresh_seed, row_seeds, sampling_params
from rollout_server.http.requests.tokens.prompts import PromptTokens, how_many, prompts_of, room
from rollout_server.http.residents import residents_of
from rollout_server.http.routes.openai.jobs import OPENAI_WORDS, Job, last_events, respond
from rollout_server.http.service import Service, request_id
from rollout_server.quoting import counted
from rollout_server.rollout import (
    BASE,
    PolicyAddress,
    PolicyVersion,
    RolloutRequest,
    SamplingParams,
    Wants,
)
from rollout_server.schemas.openai.completions import CompletionsReply, CompletionsRequest
from rollout_server.text.token_strings import TokenStrings


class CompletionChoice(Choice):
    """A choice as this route writes it."""

    def __init__(self, job: CompletionsJob, prompt_index: int, sample_index: int) -> None:
        index = prompt_index * job.data.n + sample_index
        echo = job.echoes[prompt_index] if job.echoes else None
        super().__init__(index, job.reading, job.groups[prompt_index], echo)
        self._asked_ids = job.data.return_token_ids
        self._prompt = job.prompts[prompt_index].ids

    def whole(self, piece: Piece) -> dict[str, Any]:
        return self._entry(piece, first=True)

    def part(self, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        if piece.text or piece.finish_reason or self.told(piece, token_ids=self._asked_ids):
            return self._entry(piece, first=first)
        return None

    def _entry(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """The first part carries the prompt's ids."""
        entry: dict[str, Any] = {
            "index": self.index,
            "text": piece.text,
            "logprobs": None if self._reading.top_logprobs is None else four_arrays(piece, self._reading.strings),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "rollout": piece.rollout,
        }
        if self._asked_ids:
            entry["token_ids"] = piece.token_ids
            entry["prompt_token_ids"] = self._prompt if first else None
        return entry


def four_arrays(piece: Piece, strings: TokenStrings) -> dict[str, Any]:
    """`top_logprobs` holds the token itself too; without a value (the first token of a prompt) there are no
    alternatives either."""
    tops: list[dict[str, float | None] | None] = []
    for id, value, top in zip(piece.scored_ids, piece.logprobs, piece.tops, strict=True):
        alternatives: dict[str, float | None] = {}
        for other, logprob in top:
            alternatives.setdefault(strings[other], finite(logprob))
        alternatives[strings[id]] = value
        tops.append(None if value is None and not top else alternatives)
    return {
        "tokens": [strings[id] for id in piece.scored_ids],
        "token_logprobs": piece.logprobs,
        "top_logprobs": tops,
        "text_offset": piece.offsets,
    }


@dataclass(frozen=True, slots=True)
class CompletionsJob(Job):
    """A completion as the engine gets it, and what the reply needs besides."""

    data: CompletionsRequest
    prompts: list[PromptTokens]
    echoes: list[Echo] | None

    def choice(self, prompt_index: int, sample_index: int) -> CompletionChoice:
        return CompletionChoice(self, prompt_index, sample_index)

    def body(
        self, choices: list[dict[str, Any]], tally: dict[str, Any] | None, *, chunk: bool = False, first: bool = False
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.data.model,
            "choices": choices,
            "usage": tally,
        }


class CompletionsController(Controller):
    """OpenAI's completions, with vLLM's names for what goes beyond them."""

    path = "/v1/completions"
    guards = (may_infer,)
    tags = ("openai",)

    @post(
        before_request=read_json,
        dto=StrictJson[CompletionsRequest],
        return_dto=None,
        status_code=200,
        operation_class=EventsOperation,
        summary="Complete prompts",
        description="With `stream`, server-sent events that end with `data: [DONE]`.",
        responses={200: ResponseSpec(CompletionsReply, description="n choices of every prompt."), **failures()},
    )
    async def complete(self, data: JSONBody[CompletionsRequest], request: Request[Any, Any, Any]) -> Response[Any]:
        with renamed(OPENAI_WORDS):
            return await answer(data, request, residents_of(request).of(data.model))


async def answer(data: CompletionsRequest, request: Request[Any, Any, Any], service: Service) -> Response[Any]:
    """The reply, or its stream."""
    address = service.address(data.model, request, param="model")
    length = len(await request.body())
    prompts = await beside_client(
        request, length + extra_weight(data), lambda go_on: read_prompts(data, service, go_on)
    )
    scored = await score_prompts(data, address, prompts, request, service)
    weight = length + len(prompts) * data.n
    job = await beside(weight, lambda: plan(data, address, prompts, scored, request, service))
    if data.max_tokens == 0 and scored is not None:
        return echo_only(job, scored.version)
    return await respond(job, request, service)


def read_prompts(data: CompletionsRequest, service: Service, go_on: GoOn) -> list[tuple[PromptTokens, SamplingParams]]:
    """Prompts and how to sample each, checked for vocabulary and length; what is wrong is named by its place."""
    check_rows([data.n] * how_many(data.prompt), service.config.max_rows_per_request)
    found = prompts_of(data.prompt, service.tokenizer, param="prompt", bound=service.bound(go_on))
    if data.logprobs is not None:
        service.check_top_logprobs(data.logprobs, "logprobs")
    service.check_ids(data.stop_token_ids, "stop_token_ids")
    service.check_bias(data.logit_bias, "logit_bias")
    context = service.info.max_model_len
    constraint = constraint_of(data, service)
    prompts = []
    for prompt, place in found:
        count = len(prompt.ids)
        service.check_ids(prompt.ids, place)
        if data.max_tokens == 0:
            if count > context:
                raise ContextExceeded(
                    f"{place} has {counted(count, 'token')}; the context holds {context}.", param=place
                )
            # Nothing will be sampled, but the other parameters are checked all the same.
            limit = 1
        else:
            asked = data.max_tokens if "max_tokens" in data.model_fields_set else None
            limit = room(count, asked, context, prompt_param=place, param="max_tokens")
            limit = min(limit, data.max_tokens)
        prompts.append((prompt, sampling_params(data, limit, constraint)))
    return prompts


async def score_prompts(
    data: CompletionsRequest,
    address: PolicyAddress,
    prompts: list[tuple[PromptTokens, SamplingParams]],
    request: Request[Any, Any, Any],
    service: Service,
) -> Scored | None:
    """Log-probabilities of the prompts, where they are echoed with them; also names the version of an echo alone."""
    if not data.echo or (data.logprobs is None and data.max_tokens != 0):
        return None
    return await while_connected(
        request,
        service.engine.score(
            Score(
                id=service.engine.new_id("score"),
                policy=address,
                sequences=tuple(tuple(prompt.ids) for prompt, _ in prompts),
                starts=(0,) * len(prompts),
                top_logprobs=data.logprobs or 0,
            )
        ),
    )


def plan(
    data: CompletionsRequest,
    address: PolicyAddress,
    prompts: list[tuple[PromptTokens, SamplingParams]],
    scored: Scored | None,
    request: Request[Any, Any, Any],
    service: Service,
) -> CompletionsJob:
    reading = ChoiceOptions(
        service.tokenizer,
        service.token_strings,
        service.info.eos_token_ids,
        top_logprobs=data.logprobs,
        logprobs_mode=data.logprobs_mode,
        include_stop=data.include_stop_str_in_output,
    )
    if scored is not None and address.name != BASE:
        # The completion must come from the version that scored its prompt.
        address = PolicyAddress(scored.version.name, number=scored.version.number)
    id = request_id(None, request, kind="cmpl")
    seed = fresh_seed() if data.seed is None else data.seed
    wants = Wants(top_logprobs=data.logprobs or 0, tokens_as_they_come=data.stream)
    groups = [
        RolloutRequest(
            id=id,
            prompt_ids=tuple(prompt.ids),
            sampling=sampling,
            policy=address,
            n=data.n,
            prompt_index=index,
            seeds=row_seeds(seed, None, index, data.n),
            wants=wants,
        )
        for index, (prompt, sampling) in enumerate(prompts)
    ]
    echoes = None
    if data.echo:
        sequences = scored.sequences if scored is not None and data.logprobs is not None else [None] * len(prompts)
        echoes = [Echo.of(prompt, sequence, reading) for (prompt, _), sequence in zip(prompts, sequences, strict=True)]
    return CompletionsJob(
        id=id,
        created=int(time.time()),
        groups=groups,
        reading=reading,
        include_usage=data.stream_options is not None and data.stream_options.include_usage,
        stream=data.stream,
        data=data,
        prompts=[prompt for prompt, _ in prompts],
        echoes=echoes,
    )


def echo_only(job: CompletionsJob, version: PolicyVersion) -> Response[Any]:
    """`max_tokens: 0`: the prompts and their log-probabilities; nothing is sampled."""
    choices = []
    for index in range(len(job.prompts) * job.data.n):
        choice = job.choice(*divmod(index, job.data.n))
        choices.append(choice.whole(choice.start() + choice.finish_unasked()))
    headers = policy_headers([version])
    if not job.stream:
        return json_response(job.body(choices, usage((), job.prompt_tokens)), headers=headers)

    async def events() -> AsyncIterator[bytes]:
        yield sse_event(job.body(choices, None))
        for tail in last_events(job, usage((), job.prompt_tokens)):
            yield tail

    return stream(events(), media_type=SSE, headers=headers)
