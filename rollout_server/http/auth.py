"""Who may do what: two bearer keys, compared in constant time.

`ROLLOUT_API_KEY` opens inference, `ROLLOUT_ADMIN_KEY` that and whatever changes state. A server without keys ignores
the header, but lets no web page of another site change state, nor one that has its own name lead here read anything;
one with only an inference key lets nobody change state over HTTP.
"""

from __future__ import annotations

import hmac
import re
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.types import HTTPScope
from pydantic import SecretStr

from rollout_server.config import ServerConfig, is_address, is_loopback
from rollout_server.errors import Forbidden, Unauthorized
from rollout_server.http.service import service_of
from rollout_server.quoting import quoted

Connection = ASGIConnection[Any, Any, Any, Any]

HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+))(?::[0-9]*)?")
"""An address in brackets or a name, and a port."""


def _matches(given: bytes, key: SecretStr | None) -> bool:
    return key is not None and hmac.compare_digest(given, key.get_secret_value().encode())


def _bearer(connection: Connection) -> bytes:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("This server wants a key: send 'Authorization: Bearer <key>'.")
    return token.strip().encode("utf-8", "surrogateescape")


def _refuse_other_sites(connection: Connection) -> None:
    """Without keys, any web page that the user opens could send a form to this server; a browser names the page's
    origin then."""
    origin = connection.headers.get("origin")
    if origin is None:
        return
    site = _host_of(origin)
    if site is None or not (site == _host_of(f"//{connection.headers.get('host', '')}") or is_loopback(site)):
        raise Forbidden(
            f"A page of {quoted(origin)} may not change the state of this server: set ROLLOUT_ADMIN_KEY and send it.",
            param="Origin",
        )


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return None


def check_host(scope: HTTPScope, config: ServerConfig) -> None:
    """Without keys, whoever runs a web site could let its name lead to this machine, and its pages would be of the same
    site as this server then; the browser still says by which name it came. Raises `Forbidden` unless that is
    one that nobody else can give away: of this machine, an address, or one that the server was told."""
    named = [value for name, value in scope["headers"] if name.lower() == b"host"]
    if not named:
        return  # HTTP/1.0, which health checks still speak and no browser does
    header = named[0].decode("latin-1") if len(named) == 1 else ""
    match = HOST.fullmatch(header)
    host = (match[1] or match[2]).lower().removesuffix(".") if match else ""
    known = {config.host.lower(), *config.allow_host, (scope.get("server") or ("",))[0].lower()}
    if host == "localhost" or host.endswith(".localhost") or is_address(host) or (host and host in known):
        return
    raise Forbidden(
        f"Without keys this server answers to addresses and to names of this machine only, not to {quoted(header)}: "
        "use its address, start it with --allow-host NAME, or set ROLLOUT_API_KEY and ROLLOUT_ADMIN_KEY.",
        param="Host",
    )


def may_infer(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard of every route that reads or samples."""
    config = service_of(connection).config
    if not config.protected:
        return
    given = _bearer(connection)
    # Both are compared whatever the first says, so that the time tells nothing.
    if not (_matches(given, config.api_key) | _matches(given, config.admin_key)):
        raise Unauthorized("Invalid API key.")


def may_administer(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard of every route that changes state."""
    config = service_of(connection).config
    if not config.protected:
        _refuse_other_sites(connection)
        return
    given = _bearer(connection)
    inference, administration = _matches(given, config.api_key), _matches(given, config.admin_key)
    if administration:
        return
    if not inference:
        raise Unauthorized("Invalid API key.")
    if config.admin_key is None:
        raise Forbidden("This server was started without ROLLOUT_ADMIN_KEY, so nothing can be changed over HTTP.")
    raise Forbidden("This key opens inference only; changing weights and pausing need the ROLLOUT_ADMIN_KEY.")
