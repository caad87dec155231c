"""`POST /v1/completions`: the OpenAI route, for evaluation tools."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.handle import Subscription
from rollout_server.engine.messages import RowFinished, Score, Scored, TokensSampled
from rollout_server.errors import ContextExceeded
from rollout_server.http.auth import may_infer
from rollout_server.http.body import StrictJson, beside, read_json
from rollout_server.http.choices import Choice, Echo, Piece, Reading
from rollout_server.http.documented import failures
from rollout_server.http.encoding import json_response, usage, weight_of
from rollout_server.http.problems import renamed
from rollout_server.http.prompts import PromptTokens, completion_prompts, room
from rollout_server.http.rollouts import request_id
from rollout_server.http.sampling import check_rows, fresh_seed, row_seeds, sampling_params
from rollout_server.http.service import Service, service_of
from rollout_server.http.streaming import (
    SSE,
    SSE_DONE,
    chained,
    collect,
    opening,
    sse_event,
    stream,
    while_connected,
)
from rollout_server.quoting import counted
from rollout_server.rollout import (
    BASE,
    FinishReason,
    PolicyAddress,
    PolicyVersion,
    Rollout,
    RolloutRequest,
    SamplingParams,
    Wants,
)
from rollout_server.schemas.completions import CompletionsReply, CompletionsRequest

OUR_WORDS: Mapping[str, str] = MappingProxyType({"policy": "model"})
"""The engine's names of fields → this route's."""


@dataclass(frozen=True, slots=True)
class Job:
    """A completion as the engine gets it, and what the reply needs besides."""

    id: str
    created: int
    data: CompletionsRequest
    prompts: list[PromptTokens]
    echoes: list[Echo] | None
    groups: list[RolloutRequest]
    reading: Reading

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def choice(self, prompt_index: int, sample_index: int) -> Choice:
        echo = self.echoes[prompt_index] if self.echoes else None
        index = prompt_index * self.data.n + sample_index
        return Choice(index, self.reading, self.groups[prompt_index].sampling, echo)

    def entry(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A choice of the reply, or its part in a chunk; the first part carries the prompt's ids."""
        data = self.data
        entry: dict[str, Any] = {
            "index": index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "rollout": piece.rollout,
        }
        if data.logprobs is not None:
            entry["logprobs"] = {
                "tokens": piece.tokens,
                "token_logprobs": piece.token_logprobs,
                "top_logprobs": piece.top_logprobs,
                "text_offset": piece.text_offset,
            }
        if data.return_token_ids:
            entry["token_ids"] = piece.token_ids
            entry["prompt_token_ids"] = self.prompts[index // data.n].ids if first else None
        return entry

    def body(self, choices: list[dict[str, Any]], tally: dict[str, int] | None) -> dict[str, Any]:
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
        summary="Complete prompts",
        description="With `stream`, server-sent events that end with `data: [DONE]`.",
        responses={200: ResponseSpec(CompletionsReply, description="n choices of every prompt."), **failures()},
    )
    async def complete(self, data: JSONBody[CompletionsRequest], request: Request[Any, Any, Any]) -> Response[Any]:
        with renamed(OUR_WORDS):
            return await answer(data, request, service_of(request))


async def answer(data: CompletionsRequest, request: Request[Any, Any, Any], service: Service) -> Response[Any]:
    """The reply, or its stream."""
    address = service.address(data.model, request, param="model")
    length = len(await request.body())
    prompts = await beside(length, lambda: read_prompts(data, service))
    scored = await score_prompts(data, address, prompts, request, service)
    weight = length + len(prompts) * data.n
    job = await beside(weight, lambda: plan(data, address, prompts, scored, request, service))
    if data.max_tokens == 0 and scored is not None:
        return echo_only(job, scored.version)
    subscription = service.engine.submit(job.id, job.groups)
    if data.stream:
        first = await opening(request, subscription)
        versions = versions_of(first)
        return stream(
            chunks(job, first, subscription),
            media_type=SSE,
            subscription=subscription,
            headers=policy_headers(versions),
        )
    rollouts = await collect(request, subscription, job.groups)
    return await beside(weight_of(rollouts), lambda: reply(job, rollouts))


def reply(job: Job, rollouts: Sequence[Rollout]) -> Response[bytes]:
    """All choices at once."""
    choices = []
    for rollout in rollouts:
        choice = job.choice(rollout.prompt_index, rollout.sample_index)
        choices.append(job.entry(choice.index, choice.start() + choice.finish(rollout), first=True))
    versions = [span.version for rollout in rollouts for span in rollout.spans]
    return json_response(job.body(choices, usage(rollouts, job.prompt_tokens)), headers=policy_headers(versions))


def read_prompts(data: CompletionsRequest, service: Service) -> list[tuple[PromptTokens, SamplingParams]]:
    """Prompts and how to sample each, checked for vocabulary and length; what is wrong is named by its place."""
    found = completion_prompts(data, service.tokenizer)
    check_rows([data.n] * len(found), service.config.max_rows_per_request)
    if data.logprobs is not None:
        service.check_top_logprobs(data.logprobs, "logprobs")
    service.check_ids(data.stop_token_ids, "stop_token_ids")
    service.check_bias(data.logit_bias, "logit_bias")
    context = service.info.max_model_len
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
            limit = room(count, data.max_tokens, context, prompt_param=place, param="max_tokens")
        prompts.append((prompt, sampling_params(data, limit)))
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
) -> Job:
    reading = Reading(data, service.tokenizer, service.token_strings, service.info.eos_token_ids)
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
    return Job(id, int(time.time()), data, [prompt for prompt, _ in prompts], echoes, groups, reading)


def echo_only(job: Job, version: PolicyVersion) -> Response[Any]:
    """`max_tokens: 0`: the prompts and their log-probabilities; nothing is sampled."""
    choices = []
    for index in range(len(job.prompts) * job.data.n):
        choice = job.choice(*divmod(index, job.data.n))
        piece = choice.start() + Piece(
            finish_reason=FinishReason.LENGTH,
            rollout={"versions": [], "logprobs_mode": job.data.logprobs_mode},
        )
        choices.append(job.entry(index, piece, first=True))
    body, headers = job.body(choices, usage((), job.prompt_tokens)), policy_headers([version])
    if not job.data.stream:
        return json_response(body, headers=headers)

    async def events() -> AsyncIterator[bytes]:
        yield sse_event(body | {"usage": None})
        for tail in last_events(job, ()):
            yield tail

    return stream(events(), media_type=SSE, headers=headers)


async def chunks(
    job: Job, first: Sequence[TokensSampled | RowFinished], subscription: Subscription
) -> AsyncIterator[bytes]:
    """A chunk whenever a choice gains something, one with its finish_reason, then the usage if asked for."""
    choices: dict[tuple[int, int], Choice] = {}
    done: list[Rollout] = []
    with renamed(OUR_WORDS):
        async for event in chained(first, subscription):
            row = event.rollout if isinstance(event, RowFinished) else event
            place = (row.prompt_index, row.sample_index)
            new = place not in choices
            choice = choices[place] if not new else choices.setdefault(place, job.choice(*place))
            piece = choice.start() if new else Piece()
            if isinstance(event, RowFinished):
                done.append(event.rollout)
                piece = piece + choice.finish(event.rollout)
            else:
                piece = piece + choice.push(event)
            if worth_sending(piece, job.data):
                yield sse_event(job.body([job.entry(choice.index, piece, first=new)], None))
    for tail in last_events(job, done):
        yield tail


def worth_sending(piece: Piece, data: CompletionsRequest) -> bool:
    """Tokens whose text is held back are news only to who asked for tokens."""
    tokens = bool(piece.token_ids) and (data.return_token_ids or data.logprobs is not None)
    return bool(piece.text or piece.finish_reason or tokens)


def last_events(job: Job, done: Sequence[Rollout]) -> Iterable[bytes]:
    if job.data.stream_options is not None and job.data.stream_options.include_usage:
        yield sse_event(job.body([], usage(done, job.prompt_tokens)))
    yield SSE_DONE


def versions_of(events: Sequence[TokensSampled | RowFinished]) -> Iterable[PolicyVersion]:
    for event in events:
        if isinstance(event, TokensSampled):
            yield event.version
        else:
            yield from (span.version for span in event.rollout.spans)


def policy_headers(versions: Iterable[PolicyVersion]) -> dict[str, str]:
    """`X-Policy: policy@7` and its digest; several versions, as a list, in the order they appear."""
    distinct = list(dict.fromkeys(versions))
    if not distinct:
        return {}
    return {
        "x-policy": ", ".join(f"{version.name}@{version.number}" for version in distinct),
        "x-policy-digest": ", ".join(version.digest for version in distinct),
    }
