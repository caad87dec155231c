"""Who may do what: two bearer keys, compared in constant time.

`ROLLOUT_API_KEY` opens inference, `ROLLOUT_ADMIN_KEY` that and whatever changes state. A server without keys ignores
the header; one with only an inference key lets nobody change state over HTTP.
"""

from __future__ import annotations

import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from pydantic import SecretStr

from rollout_server.errors import Forbidden, Unauthorized
from rollout_server.http.service import service_of

Connection = ASGIConnection[Any, Any, Any, Any]


def _matches(given: bytes, key: SecretStr | None) -> bool:
    return key is not None and hmac.compare_digest(given, key.get_secret_value().encode())


def _bearer(connection: Connection) -> bytes:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("This server wants a key: send 'Authorization: Bearer <key>'.")
    return token.strip().encode("utf-8", "surrogateescape")


def may_infer(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard of every route that reads or samples."""
    config = service_of(connection).config
    if not config.protected:
        return
    given = _bearer(connection)
    # Both are compared whatever the first says, so that the time tells nothing.
    if not (_matches(given, config.api_key) | _matches(given, config.admin_key)):
        raise Unauthorized("This key opens nothing here.")


def may_administer(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard of every route that changes state."""
    config = service_of(connection).config
    if not config.protected:
        return
    given = _bearer(connection)
    inference, administration = _matches(given, config.api_key), _matches(given, config.admin_key)
    if administration:
        return
    if not inference:
        raise Unauthorized("This key opens nothing here.")
    if config.admin_key is None:
        raise Forbidden("This server was started without ROLLOUT_ADMIN_KEY, so nothing can be changed over HTTP.")
    raise Forbidden("This key opens inference only; changing weights needs the ROLLOUT_ADMIN_KEY.")
