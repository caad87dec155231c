"""`/v1/fleet`: the engines behind this address, and letting one go."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath

from rollout_server.http.auth import may_administer, may_infer
from rollout_server.http.openapi import failures
from rollout_server.http.replies.json_entries import json_response, replica_entry
from rollout_server.http.requests.json_body import no_query
from rollout_server.http.service import service_of
from rollout_server.schemas.system import FleetReply, LeaveReply


class FleetController(Controller):
    """Replicas, which restart by themselves unless they were let go."""

    path = "/v1/fleet"
    tags = ("fleet",)

    @get(
        guards=(may_infer,),
        before_request=no_query,
        summary="The engines behind this address",
        description="A server that computes in its own process has none.",
        responses={200: ResponseSpec(FleetReply, description="Replicas by id."), **failures()},
    )
    async def all(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        status = service_of(request).engine.status
        return json_response(
            {"replicas": [replica_entry(each) for each in status.replicas], "min_replicas": status.fewest}
        )

    @post(
        "/{id:str}/drain",
        guards=(may_administer,),
        before_request=no_query,
        status_code=200,
        summary="Let a replica finish what it has, and go",
        responses={200: ResponseSpec(LeaveReply, description="It gets no more rows."), **failures()},
    )
    async def drain(self, id: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
        await service_of(request).engine.leave(id, at_once=False)
        return json_response({"id": id, "state": "draining"})

    @post(
        "/{id:str}/restart",
        guards=(may_administer,),
        before_request=no_query,
        status_code=200,
        summary="Let a replica finish what it has, and start it anew",
        description="One that joined is told to start anew. It gets its versions again before it gets rows.",
        responses={200: ResponseSpec(LeaveReply, description="It gets no more rows until it is back."), **failures()},
    )
    async def restart(self, id: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
        await service_of(request).engine.leave(id, at_once=False, again=True)
        return json_response({"id": id, "state": "restarting"})

    @delete(
        "/{id:str}",
        guards=(may_administer,),
        before_request=no_query,
        status_code=200,
        summary="Remove a replica at once",
        description="Its rows are drawn again elsewhere.",
        responses={200: ResponseSpec(LeaveReply, description="It is ended."), **failures()},
    )
    async def remove(self, id: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
        await service_of(request).engine.leave(id, at_once=True)
        return json_response({"id": id, "state": "removed"})
