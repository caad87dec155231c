"""Pictures of a request: where their bytes are, within which limits they are read, and what the model's own processor
makes of them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote_to_bytes, urlsplit

import httpx

from rollout_server.config import ServerConfig
from rollout_server.errors import InvalidField
from rollout_server.http.requests.json_body import LONG
from rollout_server.http.service import Service
from rollout_server.quoting import quoted, shortened
from rollout_server.schemas.messages import Message, PicturePart
from rollout_server.text.pictures.picture import Picture

FETCH_S = 10.0
"""How long an allowed host may take to connect, and between two pieces of a picture."""
Place = tuple[str, str]
"""A URL, and the place of what it is in the request."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The pictures of one conversation or sequence. `expand` gives each in a rendered text its placeholders; None
    without pictures."""

    pictures: tuple[Picture, ...] = ()
    expand: Callable[[str], str] | None = None


NOTHING = Shown()


def picture_weight(messages: Sequence[Message] | None, urls: Sequence[str] | None = None) -> int:
    """What pictures add to the weight of a request, so that they are decoded beside the event loop."""
    count = sum(len(message.image_urls) for message in messages or ()) + len(urls or ())
    return LONG * count


def in_messages(messages: Sequence[Message] | None, service: Service, param: str) -> Shown:
    """Pictures of a conversation; `param` is the place of its messages."""
    return _shown(list(_places(messages or (), param)), service, param)


def beside_ids(urls: Sequence[str] | None, service: Service, param: str) -> Shown:
    """Pictures whose placeholders stand in given ids; `param` is the place of their list."""
    return _shown([(url, f"{param}[{index}]") for index, url in enumerate(urls or ())], service, param)


def _places(messages: Sequence[Message], param: str) -> Iterator[Place]:
    for at, message in enumerate(messages):
        for part, content in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(content, PicturePart):
                yield content.image_url.url, f"{param}[{at}].content[{part}].image_url.url"


def _shown(places: Sequence[Place], service: Service, param: str) -> Shown:
    if not places:
        return NOTHING
    reader, config = service.pictures, service.config
    if reader is None:
        raise InvalidField(
            f"{service.info.id} reads text alone and sees no pictures: leave them out, or ask a model whose entry in "
            "/v1/models says vision.",
            param=places[0][1],
        )
    if len(places) > config.max_pictures:
        raise InvalidField(
            f"{param} shows {len(places)} pictures; at most {config.max_pictures} are read at once (--max-pictures).",
            param=param,
        )
    found = []
    for url, place in places:
        data = bytes_of(url, place, config)
        try:
            found.append(reader.read(data, config.max_picture_pixels))
        except ValueError as error:
            raise InvalidField(f"{place} is no picture that can be read: {error}.", param=place) from error
    pictures = tuple(found)
    return Shown(pictures, partial(_expanded, reader.expand, pictures, param))


def _expanded(
    expand: Callable[[str, Sequence[Picture]], str], pictures: Sequence[Picture], param: str, text: str
) -> str:
    try:
        return expand(text, pictures)
    except ValueError as error:
        raise InvalidField(f"{param} do not fit their pictures: {error}.", param=param) from error


def bytes_of(url: str, place: str, config: ServerConfig) -> bytes:
    """What a URL holds. Raises `InvalidField` for what is not there, too large, or somewhere this server does not
    look."""
    scheme, colon, rest = url.partition(":")
    match scheme.lower():
        case "data" if colon:
            return _data(rest, place, config.max_picture_bytes)
        case "http" | "https":
            return _fetched(url, place, config)
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


def _fetched(url: str, place: str, config: ServerConfig) -> bytes:
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
    limit, found = config.max_picture_bytes, bytearray()
    try:
        with httpx.stream("GET", url, timeout=FETCH_S, follow_redirects=False, trust_env=False) as reply:
            if reply.status_code != 200:
                raise InvalidField(f"{place}: {host} answered {reply.status_code}.", param=place)
            for piece in reply.iter_bytes():
                found += piece
                if len(found) > limit:
                    raise _too_large(place, limit)
    except httpx.HTTPError as error:
        raise InvalidField(
            f"{place} could not be fetched from {host} ({type(error).__name__}).", param=place
        ) from error
    return bytes(found)


def _within(data: bytes, place: str, limit: int) -> bytes:
    if len(data) > limit:
        raise _too_large(place, limit)
    if not data:
        raise InvalidField(f"{place} holds no bytes.", param=place)
    return data


def _too_large(place: str, limit: int) -> InvalidField:
    return InvalidField(f"{place} is larger than the {limit} bytes that --max-picture-bytes allows.", param=place)
