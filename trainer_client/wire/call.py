"""What a verb is before it is sent: one request, and how to read its reply. Plain values; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from trainer_client.wire.replies import Reply

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
"""A socket takes a few hundred kilobytes at a time, and the HTTP library copies the unsent rest each time: handing it
one large buffer would cost time quadratic in its size."""


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """Buffers that follow each other on the wire."""

    parts: tuple[bytes | memoryview, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)

    def chunks(self) -> Iterator[memoryview]:
        """Pieces of at most `CHUNK_BYTES`, none of them a copy; can be asked for again when the request is repeated."""
        for part in self.parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request and how to read its reply."""

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    parse: Callable[[Reply], T]
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body = field(default_factory=Body)
    idempotent: bool = False
    """Sending it twice is as good as once, so a lost connection is a reason to try again."""
    accepts: tuple[int, ...] = ()
    """Error statuses that count as an answer."""
    timeout_s: float | None = None
    """Seconds to wait for the reply, instead of the client's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCall(Call[None], Generic[T]):
    """A request whose reply comes line by line."""

    parse_line: Callable[[bytes], T | None]
    """A value, or None for the line that ends the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUpCall(Call[T], Generic[T]):
    """A request that may turn out to be needless, as an upload of what is there."""

    look: Call[T | Call[T] | None] | None = None
    """Asked first: the answer, a smaller request that does as well, or None where this one is needed."""
