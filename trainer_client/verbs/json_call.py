"""How the body of a call is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from trainer_client.data.versions import PolicyRef, PublishedVersion
from trainer_client.wire.binary_rows import MEDIA_TYPE
from trainer_client.wire.call import Call
from trainer_client.wire.encoding import json_body
from trainer_client.wire.replies import Reply

T = TypeVar("T")

BINARY: Mapping[str, str] = MappingProxyType({"accept": f"{MEDIA_TYPE}, application/json;q=0.5"})
"""Rollouts and scores are asked for as arrays; a server that only writes JSON is understood as well."""
Addressed = str | PublishedVersion | PolicyRef
"""A policy by address (`NAME`, `NAME@7`, `NAME@sha256:…`, `base`; of another model `MODEL/NAME`), or exactly the
version a push returned."""


def post(path: str, body: Mapping[str, Any], parse: Callable[[Reply], T], **about: Any) -> Call[T]:
    headers = {"content-type": "application/json", **about.pop("headers", {})}
    return Call(method="POST", path=path, parse=parse, headers=headers, body=json_body(body), **about)


def address(policy: Addressed) -> str:
    return policy if isinstance(policy, str) else f"{policy.name}@{policy.digest}"


def without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
