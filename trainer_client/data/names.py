"""Names and version numbers that become part of a path. What cannot be one is refused before any request: quoted, a
slash would reach another route on its way through proxies and routers."""

from __future__ import annotations

import operator
import re
from typing import Any

from trainer_client.errors import InvalidName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RULE = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
SHOWN = 64
"""The most characters of a wrong name that the sentence repeats."""


def checked(name: object) -> str:
    """`name`, if a policy can be called so. Raises `InvalidName` with the server's own sentence."""
    if isinstance(name, str) and NAME.fullmatch(name):
        return str(name)
    raise InvalidName(f"{shown(name)} is not a policy name, which is {RULE}.", param="name")


def path_of(name: object, version: Any = None) -> str:
    """The route of a policy, or of one of its versions. Raises `InvalidName`, and `TypeError` for what is no number."""
    path = f"/v1/weights/{checked(name)}"
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
