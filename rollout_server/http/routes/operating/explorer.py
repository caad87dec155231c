"""`/schema`: the API's document, and for a browser a page to try it on, which fetches nothing from elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from litestar import Request, Response, Router, get
from litestar.params import FromPath

from rollout_server.http.page.assets import HEADERS, INDEX
from rollout_server.http.requests.json_body import no_query
from rollout_server.http.routes.operating.page import file_of

PATH = "/schema"
FILES = "rollout_server.http.explorer"
DOCUMENT = "/openapi.json"
PLAIN, PAGE = "application/json", "text/html"
EXPLORER_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        **HEADERS,
        # Swagger UI writes styles and markup, of this server's document and of what it answers.
        "content-security-policy": "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                "style-src 'self' 'unsafe-inline'",
                "img-src 'self' data:",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            )
        ),
        "vary": "accept",
    }
)


def explorer_router() -> Router:
    """What Litestar adds the document to; a new one for each application."""
    return Router(
        PATH,
        route_handlers=[file],
        include_in_schema=False,
        before_request=page_for_browsers,
        dto=None,
        return_dto=None,
    )


async def page_for_browsers(request: Request[Any, Any, Any]) -> Response[bytes] | None:
    """The page, where the document's own address is asked for by who would rather have a page."""
    path = request.scope["path"].rstrip("/")
    if path == PATH + DOCUMENT or (path == PATH and request.accept.best_match([PLAIN, PAGE]) != PAGE):
        # Whoever asks first waits a second for it to be drawn, and nobody else does; it is kept then.
        await asyncio.to_thread(request.route_handler.fn, request)
        return None
    if path != PATH:
        return None
    if request.scope["raw_path"].endswith(b"/"):
        # The page's links are relative, so that a proxy may serve it under another path: they hold at one address.
        return Response(b"", status_code=308, headers={**EXPLORER_HEADERS, "location": f"..{PATH}"}, media_type=PAGE)
    return file_of(request, INDEX, FILES, EXPLORER_HEADERS)


@get("/files/{name:str}", before_request=no_query, summary="A file of the page to try the API on")
async def file(name: FromPath[str], request: Request[Any, Any, Any]) -> Response[bytes]:
    return file_of(request, name, FILES, EXPLORER_HEADERS)
