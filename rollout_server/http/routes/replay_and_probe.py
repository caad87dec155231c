"""`POST /v1/replay` and `POST /v1/probe`: what a trainer asks of rollouts it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.messages.scoring import RecordedRow, Replay, Score, Scored
from rollout_server.engine.messages.spans import tiling_fault
from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.problems import renamed
from rollout_server.http.replies.divergence import Divergence
from rollout_server.http.replies.json_entries import json_response, version_entry
from rollout_server.http.replies.streaming import while_connected
from rollout_server.http.requests.grammars import check_given, constraint_of, extra_weight
from rollout_server.http.requests.json_body import StrictJson, beside, read_json
from rollout_server.http.requests.sampling import sampling_params
from rollout_server.http.requests.spans import read_span
from rollout_server.http.requests.tokens.pictures import RequestPictures, picture_weight
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service, header_id
from rollout_server.quoting import counted
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion, SpanAddress
from rollout_server.schemas.replay_and_probe import (
    ProbeReply,
    ProbeRequest,
    RecordedRollout,
    ReplayReply,
    ReplayRequest,
    RolloutToProbe,
    RolloutToReplay,
)
from rollout_server.schemas.spans import SpanToRead
from rollout_server.text.pictures.picture import Picture


class RecordedController(Controller):
    """Rollouts sent back."""

    path = "/v1"
    guards = (may_infer,)
    tags = ("rollouts",)

    @post(
        "/replay",
        before_request=read_json,
        dto=StrictJson[ReplayRequest],
        return_dto=None,
        status_code=200,
        summary="Draw rollouts again",
        description="Every sampled token is drawn once more from the logits after the recorded ones before it, on "
        "the version it names (by digest), with the row's seed and sampling parameters. Tokens with `loss_mask` 0 are "
        "only read.",
        responses={200: ResponseSpec(ReplayReply, description="Rollouts in the order of the request."), **failures()},
    )
    async def replay(self, data: JSONBody[ReplayRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = service_for(data.rollouts, request)
        header_id(request)
        weight = len(await request.body()) + sum(extra_weight(row.sampling) for row in data.rollouts)
        weight += sum(picture_weight(None, row.images) for row in data.rollouts)
        rows = await beside(weight, lambda: _recorded(data.rollouts, request, service))
        command = Replay(service.engine.new_id("replay"), tuple(rows))
        replayed = await while_connected(request, service.engine.replay(command))
        entries = [asdict(row) | {"exact": row.exact} for row in replayed.rows]
        return json_response({"rollouts": entries, "base": service.base, "instance": service.instance})

    @post(
        "/probe",
        before_request=read_json,
        dto=StrictJson[ProbeRequest],
        return_dto=None,
        status_code=200,
        summary="Compare with the trainer",
        description="How far the trainer's log-probabilities are from the recorded ones, and from those of a "
        "teacher-forced pass now, by version. Tokens with `loss_mask` 0 or a null are skipped.",
        responses={
            200: ResponseSpec(ProbeReply, description="Versions in the order in which they first appear."),
            **failures(),
        },
    )
    async def probe(self, data: JSONBody[ProbeRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = service_for(data.rollouts, request)
        header_id(request)
        weight = len(await request.body()) + sum(picture_weight(None, row.images) for row in data.rollouts)
        rows = await beside(weight, lambda: list(_to_read(data.rollouts, request, service)))
        versions: list[dict[str, Any]] = []
        if rows:
            score = _score(rows, service.engine.new_id("probe"), data.temperature)
            places = {
                f"sequences[{at}].versions[{span}]": f"{row.place}.versions[{span}]"
                for at, row in enumerate(rows)
                for span in range(len(row.spans))
            }
            with renamed(places):
                scored = await while_connected(request, service.engine.score(score))
            versions = await beside(weight, lambda: _probed(rows, scored, data.temperature))
        return json_response(
            {
                "versions": versions,
                "temperature": data.temperature,
                "base": service.base,
                "instance": service.instance,
            }
        )


def service_for(rollouts: Sequence[RecordedRollout], request: Request[Any, Any, Any]) -> Service:
    """The model that the rollouts are of; spans that are of another one are refused when they are read."""
    named = (span.policy for row in rollouts for span in row.versions if span.policy is not None)
    return residents_of(request).of(next(named, None))


# ---- what is read -------------------------------------------------------------------------------------------------


def judged(row: RecordedRollout) -> tuple[bool, ...]:
    return tuple(map(bool, row.loss_mask)) if row.loss_mask is not None else (True,) * len(row.token_ids)


def check(row: RecordedRollout, place: str, service: Service) -> None:
    service.check_ids(row.prompt_token_ids, f"{place}.prompt_token_ids")
    service.check_ids(row.token_ids, f"{place}.token_ids")
    count, context = len(row.prompt_token_ids) + len(row.token_ids), service.info.max_model_len
    if count > context:
        raise ContextExceeded(
            f"{place} has {counted(count, 'token')} with its prompt; the context holds {context}.",
            param=f"{place}.token_ids",
        )


def spans_of(
    row: RecordedRollout, place: str, request: Request[Any, Any, Any], service: Service
) -> tuple[SpanAddress, ...]:
    """What the tokens are read under; empty where none of them was sampled and no version is named. Given text whose
    span names no policy is read under the span beside it."""
    sampled = judged(row)
    spans: list[SpanAddress] = []
    waiting: SpanToRead | None = None
    for index, span in enumerate(row.versions):
        if span.policy is None and not any(sampled[span.start : span.end]):
            waiting = span if waiting is None else waiting.model_copy(update={"end": span.end})
            continue
        read = read_span(span, f"{place}.versions[{index}]", request, service)
        if waiting is not None and waiting.end == read.start:
            read = SpanAddress(read.address, waiting.start, read.end, read.digest, read.kv)
            waiting = None
        spans.append(read)
    if spans and waiting is not None and waiting.start == spans[-1].end:
        last = spans[-1]
        spans[-1] = SpanAddress(last.address, last.start, waiting.end, last.digest, last.kv)
    if not spans and not any(sampled):
        return ()
    if fault := tiling_fault(spans, len(row.token_ids)):
        raise InvalidField(f"{place}.versions do not fit the rollout: {fault}.", param=f"{place}.versions")
    return tuple(spans)


def _recorded(
    rollouts: Sequence[RolloutToReplay], request: Request[Any, Any, Any], service: Service
) -> list[RecordedRow]:
    pictures = RequestPictures(service)
    return [_row(row, f"rollouts[{at}]", request, service, pictures) for at, row in enumerate(rollouts)]


def _row(
    row: RolloutToReplay, place: str, request: Request[Any, Any, Any], service: Service, pictures: RequestPictures
) -> RecordedRow:
    check(row, place, service)
    service.check_ids(row.sampling.stop_token_ids, f"{place}.sampling.stop_token_ids")
    service.check_bias(row.sampling.logit_bias, f"{place}.sampling.logit_bias")
    constraint = constraint_of(row.sampling, service, prefix=f"{place}.sampling.")
    if constraint is not None:
        check_given(constraint, row.token_ids, judged(row), f"{place}.token_ids")
    # What was returned has a limit; where it was left out, the row's own length is one that it kept.
    longest = row.sampling.max_tokens or max(1, len(row.token_ids), row.sampling.min_tokens)
    return RecordedRow(
        prompt_ids=tuple(row.prompt_token_ids),
        token_ids=tuple(row.token_ids),
        spans=spans_of(row, place, request, service),
        judged=judged(row),
        logprobs=tuple(row.logprobs) if row.logprobs is not None else (None,) * len(row.token_ids),
        sampling=sampling_params(row.sampling, longest, constraint, prefix=f"{place}.sampling."),
        seed=row.seed,
        pictures=pictures.beside_ids(row.images, f"{place}.images").pictures,
    )


# ---- probing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    given: RolloutToProbe
    spans: tuple[SpanAddress, ...]
    pictures: tuple[Picture, ...]

    def recorded(self, temperature: float) -> list[float | None]:
        """The recorded log-probabilities at that temperature, None where there is none."""
        row = self.given
        nothing: list[float | None] = [None] * len(row.token_ids)
        if temperature == 1:
            return row.logprobs or nothing
        other = row.sampling is not None and row.sampling.temperature != temperature
        if other or row.sampling_logprobs is None or row.log_kept_mass is None:
            return nothing
        return [
            None if value is None or mass is None else value + mass
            for value, mass in zip(row.sampling_logprobs, row.log_kept_mass, strict=True)
        ]


def _to_read(rollouts: Sequence[RolloutToProbe], request: Request[Any, Any, Any], service: Service) -> Iterator[_Row]:
    """The rows that have something to compare, all of them checked."""
    pictures = RequestPictures(service)
    for index, row in enumerate(rollouts):
        place = f"rollouts[{index}]"
        check(row, place, service)
        spans = spans_of(row, place, request, service)
        if spans:
            yield _Row(place, row, spans, pictures.beside_ids(row.images, f"{place}.images").pictures)


def _score(rows: Sequence[_Row], id: str, temperature: float) -> Score:
    return Score(
        id=id,
        policy=PolicyAddress(BASE),
        sequences=tuple((*row.given.prompt_token_ids, *row.given.token_ids) for row in rows),
        starts=tuple(len(row.given.prompt_token_ids) for row in rows),
        temperature=temperature,
        spans=tuple(row.spans for row in rows),
        by_digest=True,
        pictures=tuple(row.pictures for row in rows) if any(row.pictures for row in rows) else (),
    )


@dataclass(slots=True)
class _Compared:
    """The compared tokens of one version."""

    trainer: list[float] = field(default_factory=list)
    rescored: list[float] = field(default_factory=list)
    recorded: list[tuple[float, float]] = field(default_factory=list)
    """(trainer, server) of those that have a recorded value."""


def _probed(rows: Sequence[_Row], scored: Scored, temperature: float) -> list[dict[str, Any]]:
    by_version: dict[PolicyVersion, _Compared] = {}
    for row, sequence in zip(rows, scored.sequences, strict=True):
        recorded, sampled = row.recorded(temperature), judged(row.given)
        for span in sequence.spans:
            for at in range(span.start, span.end):
                trainer, server, old = row.given.trainer_logprobs[at], sequence.logprobs[at], recorded[at]
                if trainer is None or server is None or not sampled[at]:
                    continue
                compared = by_version.setdefault(span.version, _Compared())
                compared.trainer.append(trainer)
                compared.rescored.append(server)
                if old is not None:
                    compared.recorded.append((trainer, old))
    return [
        version_entry(version)
        | {
            "tokens": len(compared.trainer),
            "recorded": asdict(Divergence.of(*zip(*compared.recorded, strict=True))) if compared.recorded else None,
            "rescored": asdict(Divergence.of(compared.trainer, compared.rescored)),
        }
        for version, compared in by_version.items()
    ]
