"""Where the bytes of a picture are: in a data: URL, or at a host that the operator allows."""

from __future__ import annotations

import asyncio
import base64
import binascii
from urllib.parse import unquote_to_bytes, urlsplit

import httpx

from rollout_server.config import ServerConfig
from rollout_server.errors import InvalidField
from rollout_server.quoting import quoted, shortened

FETCH_S = 10.0
"""How long an allowed host may take, from looking up its name to the last byte of a picture."""


def bytes_of(url: str, place: str, config: ServerConfig, within_s: float = FETCH_S) -> bytes:
    """What a URL holds; on a thread that runs no event loop. Raises `InvalidField` for what is not there, too large,
    somewhere this server does not look, or not there within so many seconds."""
    scheme, colon, rest = url.partition(":")
    match scheme.lower():
        case "data" if colon:
            return _data(rest, place, config.max_picture_bytes)
        case "http" | "https":
            return _fetched(url, place, config, within_s)
    raise InvalidField(
        f"{place} is {quoted(url)}; a picture comes as data:image/png;base64,… and nothing on this machine is opened.",
        param=place,
    )


def _data(rest: str, place: str, limit: int) -> bytes:
    header, comma, body = rest.partition(",")
    kind, *marks = (part.strip().lower() for part in header.split(";"))
    if not comma:
        raise InvalidField(f"{place} is a data: URL without a comma, behind which its bytes stand.", param=place)
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise InvalidField(f"{place} holds {shortened(kind)}; this server reads pictures.", param=place)
    encoded = "base64" in marks
    # Before anything is decoded: three bytes in four characters.
    if (len(body) * 3 // 4 - 2 if encoded else body.count("%") + len(body) // 3) > limit:
        raise _too_large(place, limit)
    try:
        found = base64.b64decode(body, validate=True) if encoded else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise InvalidField(f"{place} is not base64 ({error}).", param=place) from error
    return _within(found, place, limit)


def _fetched(url: str, place: str, config: ServerConfig, within_s: float) -> bytes:
    """From a host that the operator allows; a redirect could lead anywhere, so none is followed."""
    try:
        host = (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        host = ""
    if host not in config.allow_image_host:
        raise InvalidField(
            f"{place} is {quoted(url)}, and this server fetches nothing from {quoted(host)}: send the picture as a "
            "data: URL, or start the server with --allow-image-host.",
            param=place,
        )
    try:
        # Time-outs of a client are of each wait: a host that gives a byte now and then would be waited for for ever.
        return asyncio.run(asyncio.wait_for(_read(url, host, place, config.max_picture_bytes), within_s))
    except (httpx.HTTPError, TimeoutError) as error:
        reason = f"it took more than {within_s:g} s" if isinstance(error, TimeoutError) else type(error).__name__
        raise InvalidField(f"{place} could not be fetched from {host} ({reason}).", param=place) from error


async def _read(url: str, host: str, place: str, limit: int) -> bytes:
    found = bytearray()
    async with (
        httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as client,
        client.stream("GET", url) as reply,
    ):
        if reply.status_code != 200:
            raise InvalidField(f"{place}: {host} answered {reply.status_code}.", param=place)
        async for piece in reply.aiter_bytes():
            found += piece
            if len(found) > limit:
                raise _too_large(place, limit)
    return bytes(found)


def _within(data: bytes, place: str, limit: int) -> bytes:
    if len(data) > limit:
        raise _too_large(place, limit)
    if not data:
        raise InvalidField(f"{place} holds no bytes.", param=place)
    return data


def _too_large(place: str, limit: int) -> InvalidField:
    return InvalidField(f"{place} is larger than the {limit} bytes that --max-picture-bytes allows.", param=place)
