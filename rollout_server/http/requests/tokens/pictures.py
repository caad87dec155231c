"""Pictures of a request: within which limits they are read, and what the model's own processor makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.requests.json_body import LONG
from rollout_server.http.requests.tokens.picture_urls import bytes_of
from rollout_server.http.service import Service
from rollout_server.quoting import counted
from rollout_server.schemas.messages import Message, PicturePart
from rollout_server.text.pictures.picture import Picture
from rollout_server.text.pictures.reader import PictureReader

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


@dataclass(frozen=True, slots=True)
class _File:
    """A picture's file, as far as its head tells of it."""

    place: str
    key: bytes
    """SHA-256 of its bytes."""
    data: bytes
    tokens: int


class RequestPictures:
    """The pictures of one request. Each is fetched, counted and made ready once, however often it is shown; what its
    head says is held against the limits before it is decoded."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pixels = 0
        self._files: dict[str, _File] = {}
        """By their URLs."""
        self._tokens: dict[bytes, int] = {}
        self._read: dict[bytes, Picture] = {}

    def in_messages(self, messages: Sequence[Message] | None, param: str) -> Shown:
        """Pictures of a conversation; `param` is the place of its messages."""
        return self._shown(list(_places(messages or (), param)), param)

    def beside_ids(self, urls: Sequence[str] | None, param: str) -> Shown:
        """Pictures whose placeholders stand in given ids; `param` is the place of their list."""
        return self._shown([(url, f"{param}[{index}]") for index, url in enumerate(urls or ())], param)

    def _shown(self, places: Sequence[Place], param: str) -> Shown:
        if not places:
            return NOTHING
        reader, config = self._service.pictures, self._service.config
        if reader is None:
            raise InvalidField(
                f"{self._service.info.id} reads text alone and sees no pictures: leave them out, or ask a model whose "
                "entry in /v1/models says vision.",
                param=places[0][1],
            )
        if len(places) > config.max_pictures:
            raise InvalidField(
                f"{param} shows {len(places)} pictures; at most {config.max_pictures} are read at once "
                "(--max-pictures).",
                param=param,
            )
        files = [self._file(url, place, reader) for url, place in places]
        self._check_context(files, param)
        pictures = tuple(self._picture(file, reader) for file in files)
        return Shown(pictures, partial(_expanded, reader.expand, pictures, param))

    def _file(self, url: str, place: str, reader: PictureReader) -> _File:
        if (known := self._files.get(url)) is not None:
            return known
        config = self._service.config
        data = bytes_of(url, place, config)
        key = hashlib.sha256(data).digest()
        if key not in self._tokens:
            with _named(place):
                measure = reader.measure(data, config.max_picture_pixels)
            self._pixels += measure.pixels
            if self._pixels > config.max_request_pixels:
                raise InvalidField(
                    f"{place} brings the pictures of this request to {self._pixels} pixels, each picture counted once; "
                    f"{config.max_request_pixels} are read at most (--max-request-pixels): send several requests.",
                    param=place,
                )
            self._tokens[key] = measure.tokens
        self._files[url] = found = _File(place, key, data, self._tokens[key])
        return found

    def _check_context(self, files: Sequence[_File], param: str) -> None:
        tokens, context = sum(file.tokens for file in files), self._service.info.max_model_len
        if tokens > context:
            raise ContextExceeded(
                f"{param} shows pictures of {counted(tokens, 'token')}; the context holds {context}.", param=param
            )

    def _picture(self, file: _File, reader: PictureReader) -> Picture:
        if (found := self._read.get(file.key)) is None:
            make = partial(reader.read, file.data, self._service.config.max_picture_pixels)
            with _named(file.place):
                self._read[file.key] = found = self._service.kept_pictures.get(file.key, make)
        return found


@contextmanager
def _named(place: str) -> Iterator[None]:
    """What is said of a picture is said with its place."""
    try:
        yield
    except ValueError as error:
        raise InvalidField(f"{place} is no picture that can be read: {error}.", param=place) from error


def _places(messages: Sequence[Message], param: str) -> Iterator[Place]:
    for at, message in enumerate(messages):
        for part, content in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(content, PicturePart):
                yield content.image_url.url, f"{param}[{at}].content[{part}].image_url.url"


def _expanded(
    expand: Callable[[str, Sequence[Picture]], str], pictures: Sequence[Picture], param: str, text: str
) -> str:
    try:
        return expand(text, pictures)
    except ValueError as error:
        raise InvalidField(f"{param} do not fit their pictures: {error}.", param=param) from error
