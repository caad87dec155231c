"""A request as JSON: arrays of any framework, numpy's numbers as values and as keys, and what JSON cannot say refused
by the name of the option that holds it."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np

from trainer_client.data.arrays import host_array, is_array
from trainer_client.data.names import shown
from trainer_client.wire.call import Body

WITHIN = "sampling."
"""The object of the request that holds the sampling options, which a caller gives beside the others."""


def json_body(value: Mapping[str, Any]) -> Body:
    """Raises `ValueError` or `TypeError` for what JSON cannot say."""
    try:
        return Body((_dumped(value).encode(),))
    except (TypeError, ValueError, RuntimeError):
        pass
    # Only now is it worth a look at every value: a key that json does not know, or something to be named.
    return Body((_dumped(_plain(value, "")).encode(),))


def _dumped(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=_listed, allow_nan=False)


def _listed(value: Any) -> Any:
    """An array as numbers, NaN as null: where there is no value, the contract has null and arrays NaN."""
    if not is_array(value):
        raise TypeError
    array = host_array(value)
    if array.ndim and array.dtype.kind == "f" and (missing := np.isnan(array)).any():
        array = array.astype(object)
        array[missing] = None
    return array.tolist()


def _plain(value: Any, path: str) -> Any:
    match value:
        case Enum():
            return _plain(value.value, path)
        case str() | bool() | int() | None:
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{_told(path)} is {float(value)}, which no request can say: give a finite number.")
            return float(value)
        case Mapping():
            return _fields(value, path)
        case Sequence() | Set() if not isinstance(value, bytes | bytearray | memoryview):
            return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if is_array(value):
        try:
            return _plain(_listed(value), path)
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"{_told(path)} is a {type(value).__name__} that cannot be read here: {error}") from error
    raise TypeError(f"{_told(path)} holds {shown(value)}, which no request can say.")


def _fields(value: Mapping[Any, Any], path: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, item in value.items():
        name = key if isinstance(key, str) else _number(key, path)
        if name in fields:
            raise ValueError(f"{_told(path)} has {shown(name)} twice.")
        fields[name] = _plain(item, f"{path}.{name}" if path else name)
    return fields


def _number(key: Any, path: str) -> str:
    """A token id as a key: an integer of Python, numpy, torch or MLX."""
    try:
        return str(operator.index(key.item() if hasattr(key, "item") else key))
    except TypeError:
        raise TypeError(f"{_told(path)} has the key {shown(key)}, which is neither text nor a whole number.") from None


def _told(path: str) -> str:
    return path.removeprefix(WITHIN) or "The request"
