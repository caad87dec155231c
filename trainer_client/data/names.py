"""Names and version numbers that become part of a path. What cannot be one is refused before any request: quoted, a
slash would reach another route on its way through proxies and routers."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

from trainer_client.errors import InvalidName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RULE = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
BASE = "base"
"""What the server's first model is called, whatever it is."""
SHOWN = 64
"""The most characters of a wrong name that the sentence repeats."""


def checked(name: object) -> str:
    """`name`, if a policy can be called so. Raises `InvalidName` with the server's own sentence."""
    if isinstance(name, str) and NAME.fullmatch(name):
        return str(name)
    raise InvalidName(f"{shown(name)} is not a policy name, which is {RULE}.", param="name")


@dataclass(frozen=True, slots=True)
class Place:
    """A policy among the models of a server."""

    name: str
    model: str | None
    """None for the server's first model."""

    @classmethod
    def of(cls, name: object, model: object = None) -> Place:
        """`name` may be MODEL/NAME, as the server calls a policy of another model. Raises `InvalidName`."""
        own, slash, bare = name.rpartition("/") if isinstance(name, str) else ("", "", name)
        if slash and model not in (None, own):
            raise InvalidName(f"{shown(name)} is of the model {shown(own)}, not of {shown(model)}.", param="model")
        which = checked(own if slash else model) if slash or model is not None else None
        return cls(checked(bare), None if which == BASE else which)

    @property
    def query(self) -> dict[str, str]:
        """What tells the server which model is meant."""
        return {} if self.model is None else {"model": self.model}

    def path(self, version: Any = None) -> str:
        """The route of the policy, or of one of its versions. Raises `TypeError` for what is no number."""
        path = f"/v1/weights/{self.name}"
        if version is None:
            return path
        try:
            return f"{path}/{operator.index(version)}"
        except TypeError:
            raise TypeError(f"A version is a whole number, as 7, not {shown(version)}.") from None


def shown(value: object) -> str:
    """A wrong value for an error sentence: text in quotes, short, on one line; of an array or an object what it is."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    plain = text if text.isprintable() else f"'{ascii(value)[1:-1]}'"
    return plain if len(plain) <= SHOWN + 2 else f"{plain[:SHOWN]}…'"
