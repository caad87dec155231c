"""`/v1/pause`, `/v1/resume`, and the same as vLLM has them: `/pause`, `/resume`, `/is_paused`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from litestar import Controller, Request, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.engine.messages.control import PauseMode
from rollout_server.errors import BadBody, InvalidField
from rollout_server.http.auth import may_administer, may_infer
from rollout_server.http.openapi import PauseOperation, failures
from rollout_server.http.replies.json_entries import json_response
from rollout_server.http.replies.streaming import while_connected
from rollout_server.http.requests.json_body import StrictJson, no_query, read_json
from rollout_server.http.requests.queries import read_flag, read_query
from rollout_server.http.residents import Residents, residents_of
from rollout_server.quoting import quoted, shortened
from rollout_server.schemas.control import IsPausedReply, PauseReply, PauseRequest, StatusReply
from rollout_server.text.strict_json import parse_json

MODES: Mapping[str, PauseMode] = MappingProxyType({"abort": "abort", "wait": "wait", "keep": "keep"})


class PauseController(Controller):
    """Holds new work for as long as a trainer needs the machine or needs it quiet."""

    path = "/v1"
    guards = (may_administer,)
    tags = ("control",)

    @post(
        "/pause",
        before_request=read_json,
        dto=StrictJson[PauseRequest],
        return_dto=None,
        status_code=200,
        summary="Let new work wait",
        description="Versions are pushed and activated, requests aborted and deadlines kept meanwhile. A pause "
        "replaces the one before.",
        responses={200: ResponseSpec(PauseReply, description="It is paused."), **failures()},
    )
    async def pause(self, data: JSONBody[PauseRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        await residents.each(lambda engine: engine.pause(data.mode))
        return json_response(state(residents))

    @post(
        "/resume",
        before_request=no_query,
        status_code=200,
        summary="Go on",
        description="Takes no body, or an empty object. Does nothing if nothing is paused.",
        responses={200: ResponseSpec(PauseReply, description="It goes on."), **failures()},
    )
    async def resume(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        await no_body(request)
        await residents.each(lambda engine: engine.resume())
        return json_response(state(residents))


class PauseDoorsController(Controller):
    """Pauses and resumes, for trainers that were written for vLLM."""

    path = "/"
    tags = ("vllm",)

    @post(
        "/pause",
        guards=(may_administer,),
        status_code=200,
        operation_class=PauseOperation,
        summary="Pause as vLLM does",
        description="`mode` is `abort` (default), `wait` or `keep`; the reply comes when nothing runs any more. "
        "`clear_cache` changes nothing: what is kept is kept by version, so none of it outlives its weights. "
        "`wait_for_inflight_requests=true` is an older name of `mode=wait`.",
        responses={200: ResponseSpec(StatusReply, description="It is paused."), **failures()},
    )
    async def pause(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        residents = residents_of(request)
        mode = asked_mode(request)
        await no_body(request)
        await while_connected(request, residents.each(lambda engine: engine.pause(mode, drain=True)))
        return json_response({"status": "paused"})

    @post(
        "/resume",
        before_request=no_query,
        guards=(may_administer,),
        status_code=200,
        summary="Go on",
        responses={200: ResponseSpec(StatusReply, description="It goes on."), **failures()},
    )
    async def resume(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        await no_body(request)
        await residents_of(request).each(lambda engine: engine.resume())
        return json_response({"status": "resumed"})

    @get(
        "/is_paused",
        before_request=no_query,
        guards=(may_infer,),
        summary="Whether new work waits",
        responses={200: ResponseSpec(IsPausedReply, description="The answer in vLLM's form."), **failures()},
    )
    async def is_paused(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        paused = state(residents_of(request))["paused"]
        return json_response({"is_paused": paused})


def state(residents: Residents) -> dict[str, Any]:
    """All models are paused together; requests and rows are those of all."""
    every = [engine.status for engine in residents.living]
    mode = next((status.paused for status in every if status.paused is not None), None)
    return {
        "paused": mode is not None,
        "mode": mode,
        "waiting": sum(status.waiting for status in every),
        "running": sum(status.running for status in every),
        "instance": residents.base.instance,
    }


async def no_body(request: Request[Any, Any, Any]) -> None:
    """Raises unless the body is empty or an empty object, which some clients always send."""
    body = await request.body()
    if not body.strip():
        return
    content = parse_json(body)
    if not isinstance(content, dict):
        raise BadBody("This route takes no body, or an empty object.")
    if content:
        name = next(iter(content))
        raise InvalidField(f"This route has no field {quoted(name)}.", param=shortened(name))


def asked_mode(request: Request[Any, Any, Any]) -> PauseMode:
    """The mode that the query of vLLM's route asks for."""
    fields = read_query(request, ("mode", "clear_cache", "wait_for_inflight_requests"))
    flags = {name: read_flag(name, value) for name, value in fields.items() if name != "mode"}
    waits = flags.get("wait_for_inflight_requests", False)
    mode = fields.get("mode", "wait" if waits else "abort")
    if mode not in MODES:
        raise InvalidField(f"mode is one of {', '.join(MODES)}, not {quoted(mode)}.", param="mode")
    if waits and mode != "wait":
        raise InvalidField(
            "wait_for_inflight_requests is another name of mode=wait, and the query has both.", param="mode"
        )
    return MODES[mode]
