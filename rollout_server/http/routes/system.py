"""`/v1/models`, `/health`, `/ready`, `/metrics`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from litestar import Controller, Request, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath

from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.versions import VersionStatus
from rollout_server.errors import UnknownPolicy
from rollout_server.http.auth import may_infer
from rollout_server.http.metrics import CONTENT_TYPE
from rollout_server.http.openapi import failures
from rollout_server.http.replies.json_entries import json_response
from rollout_server.http.requests.json_body import no_query
from rollout_server.http.residents import Residents, residents_of
from rollout_server.http.service import Service
from rollout_server.quoting import quoted
from rollout_server.rollout import BASE
from rollout_server.schemas.system import HealthReply, ModelCard, ModelsReply, ReadyReply

PING_S = 5.0
"""How long the engine thread may take to answer between two steps."""
COUNTED = ("waiting", "running", "steps", "tokens")
TOLD = ("state", *COUNTED, "paused")
"""What is said of the engine of every model; what is counted, of all together too."""


class ModelsController(Controller):
    """The names a request's `model` may have."""

    path = "/v1/models"
    guards = (may_infer,)
    tags = ("openai",)

    @get(
        before_request=no_query,
        summary="What can be sampled from",
        responses={200: ResponseSpec(ModelsReply, description="The base, names, versions."), **failures()},
    )
    async def models(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_response({"object": "list", "data": every_card(residents_of(request))})

    @get(
        "/{model:path}",
        before_request=no_query,
        summary="One model of the list",
        responses={200: ResponseSpec(ModelCard, description="The entry as the list has it."), **failures()},
    )
    async def model(self, model: FromPath[Path], request: Request[Any, Any, Any]) -> Response[bytes]:
        # A Hub id has a slash, so the rest of the path is the name.
        name = str(model).removeprefix("/")
        card = next((card for card in every_card(residents_of(request)) if card["id"] == name), None)
        if card is None:
            raise UnknownPolicy(f"There is no model {quoted(name)}; GET /v1/models lists what there is.", param="model")
        return json_response(card)


class HealthController(Controller):
    """Health and readiness, for supervisors; open without a key."""

    path = "/"
    tags = ("system",)

    @get(
        "/health",
        before_request=no_query,
        summary="Whether the engine thread lives and answers",
        responses={200: ResponseSpec(HealthReply, description="The engine thread lives and answers."), **failures()},
    )
    async def health(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        for service in residents.every:
            residents.check(service)
        await asyncio.gather(*(residents.answers(service, PING_S) for service in residents.every))
        models = [
            {"model": service.name, **{name: getattr(service.engine.status, name) for name in TOLD}}
            for service in residents.every
        ]
        return json_response(
            {
                "status": "ok",
                **models[0],
                **{name: sum(model[name] for model in models) for name in COUNTED},
                "instance": residents.base.instance,
                "models": models,
            }
        )

    @get(
        "/ready",
        before_request=no_query,
        summary="Whether the model and the configured adapters are loaded",
        responses={200: ResponseSpec(ReadyReply, description="The server is ready."), **failures()},
    )
    async def ready(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        for service in residents.every:
            service.startup.check()
        return json_response({"status": "ready", "instance": residents.base.instance})


class MetricsController(Controller):
    """The metrics, in the format of Prometheus."""

    path = "/metrics"
    guards = (may_infer,)
    tags = ("system",)

    @get(
        before_request=no_query,
        summary="Counts, times and sizes in Prometheus' text format",
        media_type=CONTENT_TYPE,
        responses={
            200: ResponseSpec(str, description="Metrics.", media_type=CONTENT_TYPE, generate_examples=False),
            **failures(),
        },
    )
    async def metrics(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        base = residents_of(request).base
        return Response(base.metrics.text(lambda model: name_of(base, model)), media_type=CONTENT_TYPE)


def name_of(base: Service, model: str) -> str:
    """What requests call a model that is `model` in the labels of metrics: the base has an id once it is loaded."""
    loaded = base.engine.status.state not in ("starting", "dead")
    return base.engine.info.id if model == BASE and loaded else model


def every_card(residents: Residents) -> list[dict[str, Any]]:
    """What can be asked for of every model; one that never came up has nothing."""
    loaded = [service for service in residents.every if service is residents.base or service.loaded]
    return [card for service in loaded for card in cards(service)]


def cards(service: Service) -> list[dict[str, Any]]:
    """The base under both its names, every policy under its name if it is live, and every kept version."""
    info = service.info
    shared = {
        "object": "model",
        "created": service.created,
        "owned_by": "rollout-server",
        "max_model_len": info.max_model_len,
        "vocab_size": info.vocab_size,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "kv_bits": info.kv_bits,
        "eos_token_ids": info.eos_token_ids,
        "task": info.task,
        "labels": info.labels,
        "vision": service.pictures is not None,
    }
    found = [{"id": name, **shared, "digest": info.digest} for name in dict.fromkeys((service.name, info.id))]
    for policy in service.policies():
        own = {kept.version.number: shared | _gives(kept, info) for kept in policy.versions}
        if policy.live is not None:
            card = own.get(policy.live.number, shared)
            found.append({"id": service.called(policy.name), **card, "digest": policy.live.digest})
        for kept in policy.versions:
            name = str(kept.version)
            card = {**own[kept.version.number], "created": int(kept.created)}
            found.append({"id": name, **card, "digest": kept.version.digest})
    return found


def _gives(kept: VersionStatus, info: ModelInfo) -> dict[str, Any]:
    """What a version with a head of its own gives; nothing where it does what the base does."""
    return (
        {}
        if kept.task is None or info.scores_like(kept.task, kept.labels)
        else {"task": kept.task, "labels": [None] * kept.labels}
    )
