"""A request of an OpenAI route → its reply, whole or as server-sent events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from litestar import Request, Response

from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.http.problems import renamed
from rollout_server.http.replies.choices import Choice, ChoiceOptions, Piece
from rollout_server.http.replies.json_entries import json_response, policy_headers, usage, weight_of
from rollout_server.http.replies.streaming import SSE, SSE_DONE, RowEvents, chained, collect, opening, sse_event, stream
from rollout_server.http.requests.json_body import beside
from rollout_server.http.service import Service
from rollout_server.rollout import PolicyVersion, Rollout, RolloutRequest

OPENAI_WORDS: Mapping[str, str] = MappingProxyType({"policy": "model"})
"""The engine's names of fields → these routes'."""


@dataclass(frozen=True, slots=True)
class Job(ABC):
    """A request as the engine gets it, and what the reply needs besides."""

    id: str
    created: int
    groups: list[RolloutRequest]
    reading: ChoiceOptions
    include_usage: bool
    """The client asked for usage at the end of its stream."""
    stream: bool

    @property
    def prompt_tokens(self) -> int:
        return sum(len(group.prompt_ids) for group in self.groups)

    @abstractmethod
    def choice(self, prompt_index: int, sample_index: int) -> Choice:
        """The choice that follows one row."""

    @abstractmethod
    def body(
        self, choices: list[dict[str, Any]], tally: dict[str, Any] | None, *, chunk: bool = False, first: bool = False
    ) -> dict[str, Any]:
        """A reply, or with `chunk` an event of a stream, the `first` or a later one."""

    def tally(self, rollouts: Iterable[Rollout], choices: Iterable[Choice]) -> dict[str, Any]:
        """`usage`, once every row has ended."""
        return usage(rollouts, self.prompt_tokens)


async def respond(job: Job, request: Request[Any, Any, Any], service: Service) -> Response[Any]:
    """Has the job's rows sampled and answers with them."""
    subscription = service.observer.watch(job.id, service.engine.submit(job.id, job.groups))
    if job.stream:
        first = await opening(request, subscription)
        lines, headers = chunks(job, first, subscription), policy_headers(versions_of(first))
        return stream(lines, media_type=SSE, subscription=subscription, headers=headers)
    rollouts = await collect(request, subscription, job.groups)
    return await beside(weight_of(rollouts), lambda: reply(job, rollouts))


def reply(job: Job, rollouts: Sequence[Rollout]) -> Response[bytes]:
    """All choices at once."""
    choices = [job.choice(rollout.prompt_index, rollout.sample_index) for rollout in rollouts]
    pairs = zip(choices, rollouts, strict=True)
    entries = [choice.whole(choice.start() + choice.finish(rollout)) for choice, rollout in pairs]
    versions = [span.version for rollout in rollouts for span in rollout.spans]
    return json_response(job.body(entries, job.tally(rollouts, choices)), headers=policy_headers(versions))


async def chunks(
    job: Job, first: Sequence[TokensSampled | RowFinished], subscription: RowEvents
) -> AsyncIterator[bytes]:
    """An event whenever a choice gains something, one with its finish_reason, then the usage if asked for."""
    choices: dict[tuple[int, int], Choice] = {}
    told: set[tuple[int, int]] = set()
    done: list[Rollout] = []
    with renamed(OPENAI_WORDS):
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
            part = choice.part(piece, first=place not in told)
            if part is not None:
                yield sse_event(job.body([part], None, chunk=True, first=not told))
                told.add(place)
    for tail in last_events(job, job.tally(done, choices.values())):
        yield tail


def last_events(job: Job, tally: dict[str, Any]) -> Iterable[bytes]:
    if job.include_usage:
        yield sse_event(job.body([], tally, chunk=True))
    yield SSE_DONE


def versions_of(events: Sequence[TokensSampled | RowFinished]) -> Iterable[PolicyVersion]:
    for event in events:
        if isinstance(event, TokensSampled):
            yield event.version
        else:
            yield from (span.version for span in event.rollout.spans)
