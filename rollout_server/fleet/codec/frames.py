"""Frames: the name of a message's type and its fields by name, as MessagePack, and behind them its arrays as they are.

A reader knows the types that it takes, and refuses every other name, every field that is missing and every value of
another type. Nothing on the wire names code, so there is nothing that a stranger's bytes could run.

A version is nearly all arrays, of megabytes to gigabytes. Whoever sends one copies none of them, and whoever reads one
has them where they came in: a copy of everything at once would keep an event loop, or with the interpreter's lock every
other thread, from its work for seconds.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np

from rollout_server.engine.messages.rollouts import RowFinished, Submit
from rollout_server.engine.messages.scoring import RecordedRow, Replay
from rollout_server.fleet.codec.values import Arrays, Compile, Uncompiled, from_wire, to_wire
from rollout_server.rollout import Rollout, RolloutRequest

T = TypeVar("T", RolloutRequest, RecordedRow, Rollout)
Part = bytes | bytearray | memoryview
Frame = tuple[Part, Part]
"""What stands for a message, and its arrays."""

LENGTHS = struct.Struct("<II")
"""How long these two are stands before them."""
LONGEST = 2**32 - 1
"""Bytes of the longest of either."""
PIECE = 1 << 18
"""Bytes that are written, read or copied at once."""


class BadFrame(Exception):
    """Bytes that are no message of this protocol."""


class Codec:
    """Messages of certain types to bytes and back. `compile` makes the grammars of what is read ready."""

    def __init__(self, kinds: Iterable[type], compile: Compile) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._compile = compile
        self._decoders = {name: self._decoder(kind, memoryview(b"")) for name, kind in self._kinds.items()}
        self._names = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])

    def _decoder(self, kind: type, arrays: memoryview) -> msgspec.msgpack.Decoder[Any]:
        return msgspec.msgpack.Decoder(kind, dec_hook=partial(from_wire, self._compile, arrays))

    def parts(self, message: Any) -> list[Part]:
        """A frame with its lengths before it, of which the arrays are the message's own. Raises `BadFrame` for a type
        that is none of this protocol."""
        name, arrays = type(message).__name__, Arrays()
        if name not in self._kinds:
            raise BadFrame(f"{name} is no message of this protocol.")
        head = msgspec.msgpack.encode((name, travelling(message)), enc_hook=partial(to_wire, arrays))
        if max(len(head), arrays.nbytes) > LONGEST:
            raise BadFrame(f"A {name} of {len(head) + arrays.nbytes} bytes is longer than a frame can be.")
        return [LENGTHS.pack(len(head), arrays.nbytes) + head, *arrays.parts]

    def encode(self, message: Any) -> bytes:
        """A frame with its lengths before it, in memory once more."""
        frame = io.BytesIO()
        # Other threads have the interpreter between two pieces, which one join would keep from them.
        for piece in pieces(self.parts(message)):
            frame.write(piece)
        return frame.getvalue()

    def decode(self, head: Part, arrays: Part = b"") -> Any:
        """The message of a frame. Raises `BadFrame`."""
        try:
            name, raw = self._names.decode(head)
            decoder = self._decoders.get(name)
            if decoder is None:
                raise BadFrame(f"{name[:80]!r} is no message of this protocol.")
            if arrays:
                decoder = self._decoder(self._kinds[name], memoryview(arrays))
            return decoder.decode(raw)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadFrame(f"A frame could not be read: {error}") from error


def pieces(parts: Sequence[Part]) -> Iterator[memoryview]:
    """The same bytes, cut into what is handled at once."""
    for part in parts:
        for at in range(0, len(part), PIECE):
            yield memoryview(part)[at : at + PIECE]


def room(nbytes: int) -> memoryview:
    """Memory for so many bytes, which nobody has written zeros to."""
    return np.empty(nbytes, np.uint8).data


def next_frame(fill: Callable[[memoryview], int]) -> Frame | None:
    """The next frame of a stream that blocks; None once it has ended. `fill` reads some bytes into a buffer and returns
    how many, none at the end. Raises what it raises."""
    if (lengths := _filled(fill, LENGTHS.size)) is None:
        return None
    head, arrays = (_filled(fill, nbytes) for nbytes in LENGTHS.unpack(lengths))
    return None if head is None or arrays is None else (head, arrays)


def _filled(fill: Callable[[memoryview], int], nbytes: int) -> memoryview | None:
    found, at = room(nbytes), 0
    while at < nbytes:
        if not (came := fill(found[at:])):
            return None
        at += came
    return found


def travelling(message: Any) -> Any:
    """The same message with grammars as text, wherever a row's sampling parameters stand in it."""
    match message:
        case Submit() if any(group.sampling.constraint for group in message.groups):
            return replace(message, groups=tuple(map(_as_text, message.groups)))
        case Replay() if any(row.sampling.constraint for row in message.rows):
            return replace(message, rows=tuple(map(_as_text, message.rows)))
        case RowFinished() if message.rollout.sampling.constraint:
            return replace(message, rollout=_as_text(message.rollout))
    return message


def _as_text(holder: T) -> T:
    constraint = holder.sampling.constraint
    if constraint is None:
        return holder
    return replace(holder, sampling=replace(holder.sampling, constraint=Uncompiled(constraint.grammar)))
