"""`POST /v1/rollouts`: what a trainer calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.errors import InvalidField, RolloutError
from rollout_server.grammar import Constraint
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import LinesOperation, failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.json_entries import (
    begins_turn,
    is_complete,
    json_response,
    rollout_entry,
    rollout_text,
    usage,
    weight_of,
)
from rollout_server.http.replies.reward_reading import RowReader
from rollout_server.http.replies.row_rewards import Patience, Reading, RewardedRows
from rollout_server.http.replies.safetensors_file import binary_response, rollouts_file
from rollout_server.http.replies.streaming import (
    NDJSON,
    GoOn,
    RowEvents,
    beside_client,
    chained,
    collect,
    ndjson_line,
    opening,
    stream,
)
from rollout_server.http.requests.grammars import check_given, constraint_of, extra_weight
from rollout_server.http.requests.json_body import StrictJson, beside, read_json, wants_binary
from rollout_server.http.requests.rewards import MODEL, RewardModel, reward_model
from rollout_server.http.requests.sampling import check_rows, fresh_seed, row_seeds, sampling_params
from rollout_server.http.requests.tokens.pictures import NOTHING, RequestPictures, Shown, picture_weight
from rollout_server.http.requests.tokens.prefixes import no_room, read_prefix
from rollout_server.http.requests.tokens.prompts import room, tokens_of
from rollout_server.http.residents import residents_of
from rollout_server.http.service import ARRIVED, Service, request_id
from rollout_server.quoting import counted, quoted
from rollout_server.rollout import NO_PREFIX, OnUpdate, PolicyAddress, Rollout, RolloutRequest, Wants
from rollout_server.schemas.rollouts import Prompt, RolloutsReply, RolloutsRequest
from rollout_server.text.long_texts import Bound

MAX_TOKENS = "sampling.max_tokens"
"""This route's name of the engine's `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the engine gets it, and what the reply needs besides."""

    id: str
    data: RolloutsRequest
    address: PolicyAddress
    groups: list[RolloutRequest]
    reward_model: RewardModel | None
    service: Service
    began: float

    @property
    def prompt_tokens(self) -> int:
        return sum(len(group.given_ids) for group in self.groups)

    def is_complete(self, rollouts: Sequence[Rollout]) -> bool:
        """Returns whether as many rows of every prompt finished as were waited for."""
        finished = Counter(rollout.prompt_index for rollout in rollouts if is_complete([rollout]))
        return all(finished[group.prompt_index] >= (group.return_when or group.n) for group in self.groups)

    def entry(self, rollout: Rollout) -> dict[str, Any]:
        returns = frozenset(self.data.returns)
        group = self.groups[rollout.prompt_index]
        return rollout_entry(
            rollout,
            request_id=self.id,
            prompt_id=self.data.prompts[rollout.prompt_index].id,
            returns=returns,
            text=rollout_text(rollout, self.service.tokenizer, group) if "text" in returns else None,
        )


class RolloutsController(Controller):
    """Samples with what a policy-gradient trainer needs of them."""

    path = "/v1/rollouts"
    guards = (may_infer,)
    tags = ("rollouts",)

    @post(
        before_request=read_json,
        dto=StrictJson[RolloutsRequest],
        return_dto=None,
        status_code=200,
        operation_class=LinesOperation,
        summary="Sample rollouts",
        description="n samples of every prompt. With `stream`, NDJSON: a line per rollout, then a `done` line. "
        "`Accept: application/vnd.safetensors` gives one file of flat arrays.",
        responses={200: ResponseSpec(RolloutsReply, description="Rollouts by prompt, then sample."), **failures()},
    )
    async def sample(self, data: JSONBody[RolloutsRequest], request: Request[Any, Any, Any]) -> Response[Any]:
        service = residents_of(request).of(data.policy)
        binary = wants_binary(request, stream=data.stream)
        weight = len(await request.body()) + sum(prompt.n or data.n for prompt in data.prompts)
        weight += extra_weight(data.sampling) if data.sampling.constrained else 0
        may_show = (prompt for prompt in data.prompts if prompt.messages or prompt.images)
        weight += sum(picture_weight(prompt.messages, prompt.images) for prompt in may_show)
        job = await beside_client(request, weight, lambda go_on: plan(data, request, service, go_on))
        deadline = None if data.timeout_s is None else job.began + data.timeout_s
        with renamed({"max_tokens": MAX_TOKENS}):
            events = await submitted(job, deadline)
            subscription = service.observer.watch(job.id, events)
            if data.stream:
                first = await opening(request, subscription)
                return stream(lines(job, first, subscription), media_type=NDJSON, subscription=subscription)
            rollouts = await collect(request, subscription, job.groups)
        labels = events.labels if isinstance(events, RewardedRows) else 0
        return await beside(weight_of(rollouts), lambda: reply(job, rollouts, binary=binary, labels=labels))


async def submitted(job: Job, deadline: float | None) -> RowEvents:
    """The events of the job's rows, which come with their rewards where it names a model for them. That one is held
    before anything runs, so that one version scores them all."""
    service, options = job.service, job.data.reward
    if options is None or job.reward_model is None:
        return service.engine.submit(job.id, job.groups, deadline=deadline)
    judge = job.reward_model.service
    with renamed({"policy": MODEL}):
        scorer = await judge.engine.hold(job.id, job.reward_model.address, elsewhere=judge is not service)
    try:
        # Another model's engine knows nothing of what is held here.
        own = scorer if judge is service else None
        events = service.engine.submit(job.id, job.groups, deadline=deadline, scorer=own)
    except RolloutError:
        scorer.let_go()
        raise
    reads, prompts, same_ids = options.reads, job.data.prompts, job.reward_model.same_ids
    tokenizers, sees = (service.tokenizer, judge.tokenizer), service.pictures if judge is service else None
    reader = RowReader(reads, prompts, job.groups, *tokenizers, same_ids, judge.bound(), pictures_of=sees)
    reading = Reading(reader.ids, judge.info.head_position, reader.shared, reader.pictures)
    return RewardedRows(events, scorer, reading, Patience(options.timeout_s, deadline), service.metrics)


def reply(job: Job, rollouts: Sequence[Rollout], *, binary: bool, labels: int) -> Response[bytes]:
    """All rows at once; `labels` is how many the reward model scores, 0 where none was asked for."""
    service = job.service
    content = {
        "id": job.id,
        "policy": service.policy_state(job.address),
        "base": service.base,
        "instance": service.instance,
        "complete": job.is_complete(rollouts),
        "rollouts": [job.entry(rollout) for rollout in rollouts],
        "usage": usage(rollouts, job.prompt_tokens),
        "timings_ms": {"total": round(1e3 * (time.monotonic() - job.began), 3)},
    }
    return binary_response(rollouts_file(content, labels)) if binary else json_response(content)


async def lines(
    job: Job, first: Sequence[TokensSampled | RowFinished], subscription: RowEvents
) -> AsyncIterator[bytes]:
    """A line per rollout when it finishes, then the one that says that these were all."""
    done: list[Rollout] = []
    async for event in chained(first, subscription):
        if isinstance(event, RowFinished):
            done.append(event.rollout)
            yield ndjson_line(job.entry(event.rollout))
    yield ndjson_line({"done": True, "complete": job.is_complete(done), "usage": usage(done, job.prompt_tokens)})


def plan(data: RolloutsRequest, request: Request[Any, Any, Any], service: Service, go_on: GoOn) -> Job:
    """Everything that can be wrong with a request is found here, before the engine hears of it."""
    began = request.scope["state"][ARRIVED]
    scores = None if data.reward is None else reward_model(data.reward, data, request)
    address = service.address(data.policy, request, param="policy")
    if data.on_update != "finish" and not address.follows:
        raise InvalidField(
            f"on_update is {data.on_update!r}, but {address} never moves: leave it out, or ask for a bare name.",
            param="on_update",
        )
    service.check_top_logprobs(data.top_logprobs, "top_logprobs")
    service.check_ids(data.sampling.stop_token_ids, "sampling.stop_token_ids")
    service.check_bias(data.sampling.logit_bias, "sampling.logit_bias")
    counts = [prompt.n or data.n for prompt in data.prompts]
    places = [f"prompts[{index}].n" if prompt.n else "n" for index, prompt in enumerate(data.prompts)]
    check_rows(counts, service.config.max_rows_per_request, places)
    wants = Wants(
        entropy="entropy" in data.returns,
        top_logprobs=data.top_logprobs,
        prompt_logprobs="prompt_logprobs" in data.returns,
        base_logprobs="base_logprobs" in data.returns,
    )
    id = request_id(data.id, request, kind="ro")
    seed = fresh_seed() if data.sampling.seed is None else data.sampling.seed
    constraint = constraint_of(data.sampling, service, prefix="sampling.") if data.sampling.constrained else None
    bound, may_show = service.bound(go_on), any(prompt.messages or prompt.images for prompt in data.prompts)
    pictures = RequestPictures(service) if may_show else None
    groups = []
    for index, prompt in enumerate(data.prompts):
        place = f"prompts[{index}]"
        groups.append(
            RolloutRequest(
                id=id,
                policy=address,
                n=counts[index],
                prompt_index=index,
                seeds=row_seeds(seed, prompt.seed, index, counts[index]),
                min_version=data.min_version,
                wait_s=data.wait_s,
                on_update=OnUpdate(data.on_update),
                max_staleness=data.max_staleness,
                wants=wants,
                return_when=needed(data, counts[index], place),
                **plan_row(prompt, data, constraint, place, service, bound, shown_in(prompt, pictures, place)),
            )
        )
    return Job(id, data, address, groups, scores, service, began)


def shown_in(prompt: Prompt, pictures: RequestPictures | None, place: str) -> Shown:
    """The pictures of a prompt, in its messages or beside its ids."""
    if pictures is None:
        return NOTHING
    if prompt.images is not None:
        return pictures.beside_ids(prompt.images, f"{place}.images")
    return NOTHING if prompt.messages is None else pictures.in_messages(prompt.messages, f"{place}.messages")


def plan_row(
    prompt: Prompt,
    data: RolloutsRequest,
    constraint: Constraint | None,
    place: str,
    service: Service,
    bound: Bound,
    shown: Shown,
) -> dict[str, Any]:
    """Fields of a `RolloutRequest`: what a prompt's rows read, begin with, and are sampled by; `place` is the
    prompt's in the request."""
    tokens = tokens_of(prompt, service.tokenizer, param=place, bound=bound, expand=shown.expand)
    if prompt.token_ids is not None:
        service.check_ids(prompt.token_ids, f"{place}.token_ids")
    prefix = NO_PREFIX if prompt.prefix is None else read_prefix(prompt.prefix, f"{place}.prefix", service)
    if constraint is not None:
        check_given(constraint, prefix.token_ids, (False,) * len(prefix), f"{place}.prefix.token_ids")
    own = prompt.max_tokens is not None
    check_own_limit(prompt, data, place)
    asked, param = (prompt.max_tokens, f"{place}.max_tokens") if own else (data.sampling.max_tokens, MAX_TOKENS)
    max_tokens = room(len(tokens.ids), asked, service.info.max_model_len, prompt_param=place, param=param)
    if len(prefix) >= max_tokens:
        raise no_room(prefix, max_tokens, asked=asked is not None, place=f"{place}.prefix", param=param)
    sampling = sampling_params(data.sampling, max_tokens, constraint, prefix="sampling.")
    return {
        "prompt_ids": tuple(tokens.ids),
        "pictures": shown.pictures,
        "prefix": prefix,
        "sampling": sampling,
        "continues": not begins_turn(prompt, sampling),
    }


def needed(data: RolloutsRequest, n: int, place: str) -> int | None:
    """How many of a prompt's samples `return_when` waits for; None for all."""
    if data.return_when is None:
        return None
    if data.return_when.finished > n:
        raise InvalidField(
            f"return_when.finished is {quoted(data.return_when.finished)}, but {place} has {counted(n, 'sample')}.",
            param="return_when.finished",
        )
    return data.return_when.finished


def check_own_limit(prompt: Prompt, data: RolloutsRequest, place: str) -> None:
    """A prompt's own max_tokens beside the request's min_tokens."""
    if prompt.max_tokens is not None and prompt.max_tokens < data.sampling.min_tokens:
        raise InvalidField(
            f"{place}.max_tokens is {quoted(prompt.max_tokens)}, less than sampling.min_tokens, which is "
            f"{quoted(data.sampling.min_tokens)}.",
            param=f"{place}.max_tokens",
        )
