"""Routes that steer running requests: abort, release, reset of the prefix cache."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from rollout_server.errors import UnsupportedField
from rollout_server.http.auth import may_administer, may_infer
from rollout_server.http.openapi import ResetOperation, failures
from rollout_server.http.replies.json_entries import json_response
from rollout_server.http.requests.json_body import StrictJson, read_json
from rollout_server.http.requests.queries import read_flags
from rollout_server.http.residents import residents_of
from rollout_server.schemas.control import AbortReply, AbortRequest, ReleaseReply, ResetReply


class PrefixesController(Controller):
    """The prefix cache: KV that is kept for later requests."""

    path = "/reset_prefix_cache"
    guards = (may_administer,)
    tags = ("control",)

    @post(
        status_code=200,
        operation_class=ResetOperation,
        summary="Forget the KV that is kept for later requests",
        description="Rows go on. Results do not depend on it: a version never meets what another has read. Of vLLM's "
        "query parameters `reset_external` changes nothing, there being no cache elsewhere; `reset_running_requests` "
        "may only be false.",
        responses={200: ResponseSpec(ResetReply, description="Bytes that were freed."), **failures()},
    )
    async def reset(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        check_reset(request)
        reset = await residents_of(request).each(lambda engine: engine.reset_prefix_cache())
        return json_response({"freed_bytes": sum(each.freed_bytes for each in reset)})


def check_reset(request: Request[Any, Any, Any]) -> None:
    """Checks the query parameters that vLLM has here. Raises `UnsupportedField` for what rows could not survive."""
    flags = read_flags(request, ("reset_running_requests", "reset_external"))
    if flags.get("reset_running_requests"):
        raise UnsupportedField(
            "reset_running_requests is not supported: rows keep the KV of the version they run on.",
            param="reset_running_requests",
        )


class ControlController(Controller):
    """Ends requests by their ids, and gives memory back."""

    path = "/v1"
    guards = (may_infer,)
    tags = ("control",)

    @post(
        "/abort",
        before_request=read_json,
        dto=StrictJson[AbortRequest],
        return_dto=None,
        status_code=200,
        summary="End requests by their ids",
        description="Their rows end as `aborted` with what they have, in the replies of those requests.",
        responses={200: ResponseSpec(AbortReply, description="Which of the ids were open."), **failures()},
    )
    async def abort(self, data: JSONBody[AbortRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
        every = residents_of(request).every
        every[0].require_restored()
        asked = tuple(dict.fromkeys(data.ids))
        open_ids = {id for service in every for id in service.engine.abort(asked)}
        aborted = [id for id in asked if id in open_ids]
        return json_response({"aborted": aborted, "unknown": [id for id in asked if id not in open_ids]})

    @post(
        "/release",
        guards=[may_administer],
        status_code=200,
        summary="Give back memory that is not in use",
        description="Free KV and what MLX keeps of freed arrays; rows go on, and it grows again on demand.",
        responses={200: ResponseSpec(ReleaseReply, description="Bytes that were given back."), **failures()},
    )
    async def release(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        # One after the other: what is freed is seen in the memory of the whole process.
        released = [await engine.release() for engine in residents_of(request).living]
        freed, kv = (sum(getattr(each, what) for each in released) for what in ("nbytes", "kv_bytes"))
        return json_response({"released_bytes": freed, "kv_bytes": kv})
