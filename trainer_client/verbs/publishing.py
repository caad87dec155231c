"""Publishing, keeping and taking versions: what to send, and how to read the reply.

A push asks first what the server has: weights that are there are not sent again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any, Literal

from trainer_client.call import Call, LookedUpCall
from trainer_client.digest import adapter_digest, adapter_kind
from trainer_client.known import Sought, look
from trainer_client.names import checked, path_of
from trainer_client.parsing import (
    parse_policy,
    parse_published,
    parse_weights,
)
from trainer_client.sources import adapter_of
from trainer_client.tensors import safetensors_body
from trainer_client.verbs.json_call import post, without_none
from trainer_client.versions import PolicyLine, PolicyRef, PublishedVersion

Match = int | str | PublishedVersion | PolicyRef
"""The version that the alias must be at: its number, its digest, or an object that has one."""


def push(
    name: str,
    source: Mapping[str, Any] | str | PathLike[str] | Any,
    config: Mapping[str, Any] | Any | None = None,
    *,
    activate: bool = True,
    label: str | None = None,
    mode: Literal["adapter", "merged"] | None = None,
    dequantize: bool = False,
    if_match: Match | None = None,
    resend: bool = False,
) -> LookedUpCall[PublishedVersion]:
    """Publishes an adapter as a new version of `name`; every rollout asked for afterwards uses it or a later one.

    source     name → array (numpy, MLX, torch, anything with `__array__`; bfloat16 too, on any device), named and laid
               out as PEFT or mlx-lm saves them; or a directory with adapter_config.json and the safetensors file of
               either; or a peft model, whose active adapter is taken with the scales that its layers have now; or an
               MLX model with mlx-lm's LoRA or DoRA layers. float64 and float8 are sent as float32, with a warning;
               what torch.compile, DDP and FSDP write into names is left out
    config     what that format's adapter_config.json holds, or a LoraConfig; only with named tensors, or a directory
               without one
    activate   False stages the version without moving the name to it
    label      your own mark, at most 64 characters, echoed wherever the version is reported
    mode       `merged` serves W + ΔW as a parameter set of its own; the server's default is `adapter`,
               and for whole tensors (kinds `delta` and `full`) `merged`, the only one they have
    dequantize lets `merged` unpack a quantised base
    if_match   fail with `PreconditionFailed` unless the name points at this version now
    resend     True uploads without asking first

    The server is asked first what it has. Weights that are live, or newest, under this name are not sent again: the
    result is that version, `unchanged`, and the name is moved to it if need be. Another label than its own is a reason
    to send. Safe to repeat. Raises `DigestMismatch` if the server did not get exactly these weights, `AdapterMismatch`
    if they do not fit the base."""
    name, label = checked(name), None if label is None else str(label)
    host, config = adapter_of(source, config)
    digest = adapter_digest(host, config)
    known = digest is not None and not resend
    served = mode or ("merged" if adapter_kind(config) in ("delta", "full") else "adapter")
    sought = Sought(name=name, digest=digest or "", mode=served, label=label, activate=activate)
    options = without_none(label=label, mode=mode, dequantize="true" if dequantize else None)
    return LookedUpCall(
        method="POST",
        path="/v1/weights",
        parse=partial(parse_published, sent_digest=digest),
        query={"name": name, "activate": _flag(activate), **options},
        headers={"content-type": "application/octet-stream", **if_match_header(if_match)},
        body=safetensors_body(host, config),
        idempotent=True,
        look=look(sought) if known else None,
    )


def weights() -> Call[tuple[PolicyLine, ...]]:
    """Every name with the versions the server keeps under it."""
    return Call(method="GET", path="/v1/weights", parse=parse_weights, idempotent=True)


def policy(name: str) -> Call[PolicyLine]:
    """One name with the versions the server keeps under it. Raises `UnknownPolicy`."""
    return Call(method="GET", path=path_of(name), parse=parse_policy, idempotent=True)


def activate(name: str, version: int, *, if_match: Match | None = None) -> Call[PublishedVersion]:
    """Points `name` at a kept version: promotes a staged one, or rolls back. Raises `VersionGone` if it was freed.

    Every rollout of `name` asked for afterwards uses this version or a later one."""
    return post(
        f"{path_of(name)}/activate",
        {"version": version},
        partial(parse_published, sent_digest=None),
        headers=if_match_header(if_match),
        # after a lost reply the alias has moved, and the same if_match would fail
        idempotent=if_match is None,
    )


def if_match_header(match: Match | None) -> dict[str, str]:
    if match is None:
        return {}
    return {"if-match": f'"{getattr(match, "digest", match)}"'}


def _flag(value: bool) -> str:
    return "true" if value else "false"
