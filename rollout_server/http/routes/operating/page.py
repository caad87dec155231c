"""`/`: the live page. Its files are open, as they say nothing; what it shows leaves only to a key that may infer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litestar import Controller, Request, Response, get
from litestar.params import FromPath

from rollout_server.errors import NotFound
from rollout_server.http.auth import may_infer
from rollout_server.http.openapi import ModelOperation
from rollout_server.http.page.assets import HEADERS, INDEX, PAGE, assets
from rollout_server.http.page.frames import FRAMES_KEY, Frames
from rollout_server.http.page.rollout_view import rollout_view
from rollout_server.http.replies.json_entries import json_response
from rollout_server.http.replies.streaming import SSE, stream
from rollout_server.http.requests.json_body import beside, no_query
from rollout_server.http.requests.queries import asked_resident
from rollout_server.http.service import ASKED
from rollout_server.quoting import quoted

PRIVATE = {"cache-control": "no-store"}


class PageController(Controller):
    """The page's files, a stream of frames, and single rollouts. None of it is part of the API's document: it changes
    with the page."""

    path = "/"
    include_in_schema = False

    @get(before_request=no_query, summary="The live page")
    async def index(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        return file_of(request, INDEX)

    @get("/page/files/{name:str}", before_request=no_query, summary="A file of the page")
    async def file(self, name: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
        return file_of(request, name)

    @get("/page/state", guards=[may_infer], operation_class=ModelOperation, summary="One frame, with what went before")
    async def state(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_response(await frames_of(request).opening(), headers=PRIVATE)

    @get("/page/events", guards=[may_infer], operation_class=ModelOperation, summary="A frame a second, as events")
    async def events(self, request: Request[Any, Any, Any]) -> Response[Any]:
        frames = frames_of(request)
        if request.scope["state"].get(ASKED) == "HEAD":
            return Response(b"", media_type=SSE)  # its end would be waited for
        return stream(frames.stream(), media_type=SSE)

    @get(
        "/page/rollouts/{number:int}",
        guards=[may_infer],
        operation_class=ModelOperation,
        summary="One rollout with its text",
    )
    async def rollout(self, number: FromPath[int], request: Request[Any, Any, Any]) -> Response[bytes]:
        service = asked_resident(request)
        kept = service.observer.rollouts.find(number)
        if kept is None:
            raise NotFound(f"Rollout {number} is not kept any more: only the latest are.", param="number")
        weight = len(kept.rollout.prompt_ids) + len(kept.rollout.token_ids)
        view = await beside(weight, lambda: rollout_view(kept, service.token_strings))
        return json_response(view, headers=PRIVATE)


def frames_of(request: Request[Any, Any, Any]) -> Frames:
    """The frames of the model that the query names; without one of that of `--model`."""
    frames = request.app.state[FRAMES_KEY][asked_resident(request).name]
    if not isinstance(frames, Frames):
        raise TypeError("The application was not made by create_app.")
    return frames


def file_of(
    request: Request[Any, Any, Any], name: str, package: str = PAGE, headers: Mapping[str, str] = HEADERS
) -> Response[bytes]:
    """One of a page's files; only its tag where the browser has it already."""
    asset = assets(package).get(name)
    if asset is None:
        raise NotFound(f"The page has no file {quoted(name)}.", param="name")
    tagged = {**headers, "etag": asset.etag}
    if request.headers.get("if-none-match") == asset.etag:
        return Response(b"", status_code=304, headers=tagged, media_type=asset.media_type)
    return Response(asset.content, headers=tagged, media_type=asset.media_type)
