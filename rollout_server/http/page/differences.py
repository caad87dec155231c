"""A frame in pieces, and what of it is new to whoever saw an earlier one. A piece that stays as it was is encoded once,
however many look and however long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rollout_server.http.observing.observer import Move


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A value as JSON. Two frames that have the very same piece say the same there."""

    stands_for: object
    """Equal for values that are equal, and cheaper to make."""
    encoded: msgspec.Raw

    @classmethod
    def of(cls, stands_for: object, value: Any) -> Piece:
        return cls(stands_for, msgspec.Raw(msgspec.json.encode(value)))


def as_it_is(before: Piece | None, value: Any) -> Piece:
    """The piece of a value that costs nothing to make; the one `before` where that has the same."""
    return before if before is not None and before.stands_for == value else Piece.of(value, value)


@dataclass(frozen=True, slots=True)
class PolicyPieces:
    """A name: what is said of it as a whole, and its versions by their numbers, the oldest first."""

    head: Mapping[str, Any]
    versions: Mapping[int, Piece] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frame:
    """How things stood at one moment. One without anything is what somebody saw who saw none."""

    parts: Mapping[str, Piece] = field(default_factory=dict)
    """By key, what is told as a whole."""
    policies: Mapping[str, PolicyPieces] = field(default_factory=dict)
    rollouts: Mapping[int, Piece] = field(default_factory=dict)
    """By number, the newest first."""
    moved: int = 0
    """How often names had moved."""
    moves: Sequence[Move] = ()
    """The latest of those moves."""

    def told(self, before: Frame) -> dict[str, Any]:
        """The frame, to whoever saw the one `before`. A key that is not there is as it was; a version or a rollout
        that is as it was is told as its number, and a policy as its name."""
        said: dict[str, Any] = {
            name: part.encoded for name, part in self.parts.items() if before.parts.get(name) is not part
        }
        if not before.parts or [*self.policies.items()] != [*before.policies.items()]:
            said["policies"] = [_policy(policy, before.policies.get(name)) for name, policy in self.policies.items()]
        if not before.parts or [*self.rollouts] != [*before.rollouts]:
            said["rollouts"] = _told(self.rollouts, before.rollouts)
        new = min(self.moved - before.moved, len(self.moves))
        said["moves"] = [move._asdict() for move in self.moves[len(self.moves) - new :]]
        return said


def _policy(policy: PolicyPieces, before: PolicyPieces | None) -> str | dict[str, Any]:
    if policy == before:
        return str(policy.head["name"])
    return {**policy.head, "versions": _told(policy.versions, {} if before is None else before.versions)}


def _told(pieces: Mapping[int, Piece], before: Mapping[int, Piece]) -> list[int | msgspec.Raw]:
    return [number if before.get(number) is piece else piece.encoded for number, piece in pieces.items()]
