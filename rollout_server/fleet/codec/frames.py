"""Frames: the name of a message's type, and its fields by name, as MessagePack.

A reader knows the types that it takes, and refuses every other name, every field that is missing and every value of
another type. Nothing on the wire names code, so there is nothing that a stranger's bytes could run.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec

from rollout_server.engine.messages.rollouts import RowFinished, Submit
from rollout_server.engine.messages.scoring import RecordedRow, Replay
from rollout_server.fleet.codec.values import Compile, Uncompiled, from_wire, to_wire
from rollout_server.rollout import Rollout, RolloutRequest

T = TypeVar("T", RolloutRequest, RecordedRow, Rollout)

LENGTH = struct.Struct("<I")
"""How long a frame is stands before it."""
LONGEST, LONG = 2**32 - 1, 2**20
"""Bytes of the longest frame that there may be, and of one that is not made twice for one message."""


class BadFrame(Exception):
    """Bytes that are no message of this protocol."""


class Codec:
    """Messages of certain types to bytes and back. `compile` makes the grammars of what is read ready."""

    def __init__(self, kinds: Iterable[type], compile: Compile) -> None:
        hook = partial(from_wire, compile)
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
            kind.__name__: msgspec.msgpack.Decoder(kind, dec_hook=hook) for kind in kinds
        }
        self._names = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
        self._encoder = msgspec.msgpack.Encoder(enc_hook=to_wire)
        self._long: dict[int, tuple[weakref.ref[Any], bytes]] = {}
        """Long frames of messages that somebody still has, by the message's identity."""

    def encode(self, message: Any) -> bytes:
        """A frame with its length before it. Raises `BadFrame` for a type that is none of this protocol."""
        if id(message) in self._long:
            return self._long[id(message)][1]
        name = type(message).__name__
        if name not in self._decoders:
            raise BadFrame(f"{name} is no message of this protocol.")
        body = self._encoder.encode((name, travelling(message)))
        if len(body) > LONGEST:
            raise BadFrame(f"A {name} of {len(body)} bytes is longer than a frame can be.")
        frame = LENGTH.pack(len(body)) + body
        if len(frame) >= LONG and hasattr(message, "__weakref__"):
            at = id(message)
            self._long[at] = (weakref.ref(message, lambda _: self._long.pop(at, None)), frame)
        return frame

    def decode(self, body: bytes | bytearray | memoryview) -> Any:
        """The message of a frame without its length. Raises `BadFrame`."""
        try:
            name, raw = self._names.decode(body)
            decoder = self._decoders.get(name)
            if decoder is None:
                raise BadFrame(f"{name[:80]!r} is no message of this protocol.")
            return decoder.decode(raw)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadFrame(f"A frame could not be read: {error}") from error


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
