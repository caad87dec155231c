"""What a query may say: which model is meant, and the flags of routes that are as vLLM has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from litestar import Request

from rollout_server.errors import InvalidField
from rollout_server.http.residents import residents_of
from rollout_server.http.service import Service
from rollout_server.quoting import quoted, shortened

FLAGS: Mapping[str, bool] = MappingProxyType({"true": True, "1": True, "false": False, "0": False})


def read_query(request: Request[Any, Any, Any], names: Collection[str]) -> dict[str, str]:
    """The fields of a query; each one of `names`, and once."""
    fields: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise InvalidField(f"This route has no query parameter {quoted(name)}.", param=shortened(name))
        if name in fields:
            raise InvalidField(f"The query has {name} twice.", param=name)
        fields[name] = value
    return fields


def asked_resident(request: Request[Any, Any, Any]) -> Service:
    """The model that a query names by `model`, and nothing else; without one that of `--model`."""
    return residents_of(request).named(read_query(request, ("model",)).get("model"))


def read_flag(name: str, value: str) -> bool:
    if value.lower() not in FLAGS:
        raise InvalidField(f"{name} is true or false, not {quoted(value)}.", param=name)
    return FLAGS[value.lower()]


def read_flags(request: Request[Any, Any, Any], names: Collection[str]) -> dict[str, bool]:
    """A query of flags alone."""
    return {name: read_flag(name, value) for name, value in read_query(request, names).items()}
