"""Publishing, keeping and taking versions: what to send, and how to read the reply.

A push asks first what the server has: weights that are there are not sent again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from trainer_client.adapter.digest import adapter_digest, adapter_kind
from trainer_client.adapter.sources import adapter_of
from trainer_client.adapter.tensors import CONFIG_FILE, WEIGHT_FILES, safetensors_body
from trainer_client.data.names import BASE, Place, checked
from trainer_client.data.versions import KeptVersion, PolicyLine, PolicyRef, PublishedVersion
from trainer_client.errors import BadReply, DigestMismatch
from trainer_client.verbs.json_call import post, without_none
from trainer_client.wire.call import Body, Call, LookedUpCall
from trainer_client.wire.encoding import json_body
from trainer_client.wire.parsing import parse_kept_version, parse_policy, parse_published, parse_weights
from trainer_client.wire.replies import Reply, need, parse_json
from trainer_client.wire.safetensors_file import HostTensor, read_container

Match = int | str | PublishedVersion | PolicyRef
"""The version that the alias must be at: its number, its digest, or an object that has one."""
Format = Literal["peft", "mlx"]


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
    model: str | None = None,
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
    mode       `merged` serves W + ΔW as a parameter set of its own, as whole tensors (`delta`, `full`) always are
    dequantize lets `merged` unpack a quantised base
    if_match   fail with `PreconditionFailed` unless the name points at this version now
    resend     True uploads without asking first
    model      which model it is a version of, where the server has several; `name` may be MODEL/NAME as well

    The server is asked first what it has. Weights that are live, or newest, under this name are not sent again: the
    result is that version, `unchanged`, and the name is moved to it if need be. Another label than its own is a reason
    to send. Safe to repeat. Raises `DigestMismatch` if the server did not get exactly these weights, `AdapterMismatch`
    if they do not fit the base."""
    place, label = Place.of(name, model), None if label is None else str(label)
    host, config = adapter_of(source, config)
    digest = adapter_digest(host, config)
    served = mode or ("merged" if adapter_kind(config) in ("delta", "full") else "adapter")
    sought = Sought(place=place, digest=digest or "", mode=served, label=label, activate=activate)
    options = without_none(label=label, mode=mode, dequantize="true" if dequantize else None)
    return LookedUpCall(
        method="POST",
        path="/v1/weights",
        parse=partial(parse_published, sent_digest=digest),
        query={"name": place.name, "activate": _flag(activate), **place.query, **options},
        headers={"content-type": "application/octet-stream", **if_match_header(if_match)},
        body=safetensors_body(host, config),
        idempotent=True,
        look=look(sought) if digest is not None and not resend else None,
    )


def weights(model: str | None = None) -> Call[tuple[PolicyLine, ...]]:
    """Every name with the versions the server keeps under it, of its first model or of another one."""
    query = {} if model in (None, BASE) else {"model": checked(model)}
    return Call(method="GET", path="/v1/weights", query=query, parse=parse_weights, idempotent=True)


def policy(name: str, *, model: str | None = None) -> Call[PolicyLine]:
    """One name with the versions the server keeps under it. Raises `UnknownPolicy`."""
    place = Place.of(name, model)
    return Call(method="GET", path=place.path(), query=place.query, parse=parse_policy, idempotent=True)


def activate(
    name: str, version: int, *, if_match: Match | None = None, model: str | None = None
) -> Call[PublishedVersion]:
    """Points `name` at a kept version: promotes a staged one, or rolls back. Raises `VersionGone` if it was freed.

    Every rollout of `name` asked for afterwards uses this version or a later one."""
    place = Place.of(name, model)
    return post(
        f"{place.path()}/activate",
        {"version": version},
        partial(parse_published, sent_digest=None),
        query=place.query,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What `delete` or `delete_policy` let go."""

    name: str
    versions: tuple[int, ...]
    rows_in_use: int
    """Rows that still run on them, and keep their memory until they end."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExportedAdapter:
    """One version as a file of PEFT or mlx-lm. Pushed again, `tensors` and `config` give the same digest."""

    body: bytes | bytearray
    """The whole safetensors file, with `config` as JSON in its metadata."""
    tensors: Mapping[str, HostTensor]
    config: Mapping[str, Any]
    digest: str
    format: Format
    """Dense versions are in the base's own names, as mlx-lm has them."""

    def save(self, directory: str | PathLike[str]) -> Path:
        """Writes the two files that the format's own library loads into `directory`, which is made; returns it."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / WEIGHT_FILES[self.format == "mlx"]).write_bytes(self.body)
        (path / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", "utf-8")
        return path


def pin(name: str, version: int, pinned: bool = True, *, model: str | None = None) -> Call[KeptVersion]:
    """Keeps a version whatever its age, or with `pinned` False no longer. Raises `VersionGone` if it was freed."""
    place = Place.of(name, model)
    return Call(
        method="PATCH",
        path=place.path(version),
        query=place.query,
        parse=lambda reply: parse_kept_version(parse_json(reply.body), f"policy {name!r}"),
        headers={"content-type": "application/json"},
        body=json_body({"pinned": pinned}),
        idempotent=True,
    )


def delete(name: str, version: int, *, model: str | None = None) -> Call[Deletion]:
    """Deletes a version; rows that use it run on. Raises `Conflict` if it is live, `VersionGone` if it was freed.

    Not repeated when the connection is lost: the version may be gone then."""
    place = Place.of(name, model)
    return Call(method="DELETE", path=place.path(version), query=place.query, parse=_parse_deletion)


def delete_policy(name: str, *, model: str | None = None) -> Call[Deletion]:
    """Deletes a name with all its versions, the live one too. Raises `UnknownPolicy`."""
    place = Place.of(name, model)
    return Call(method="DELETE", path=place.path(), query=place.query, parse=_parse_deletion)


def export(name: str, version: int, *, format: Format | None = None, model: str | None = None) -> Call[ExportedAdapter]:
    """The weights of a kept version as a file of PEFT or of mlx-lm; by default PEFT's for low-rank versions, and for
    dense ones a form of their own; those of kind `full` have mlx-lm's too. Raises `VersionGone` if it was freed,
    `Conflict` where the format cannot say what the version is, `DigestMismatch` where other weights came than were
    stored."""
    place = Place.of(name, model)
    return Call(
        method="GET",
        path=f"{place.path(version)}/export",
        query=place.query | without_none(format=format),
        parse=partial(_parse_export, format=format),
        idempotent=True,
    )


def _parse_deletion(reply: Reply) -> Deletion:
    body = parse_json(reply.body)
    return Deletion(
        name=need(body, "name", str),
        versions=tuple(need(body, "deleted", list)),
        rows_in_use=need(body, "rows_in_use", int),
    )


def _parse_export(reply: Reply, format: Format | None) -> ExportedAdapter:
    try:
        tensors, metadata = read_container(reply.body)
        config = parse_json(metadata["adapter_config"])
    except (KeyError, ValueError) as error:
        raise BadReply(
            f"The exported file is not safetensors with a configuration in its metadata: {error}."
        ) from error
    digest, came = reply.headers.get("x-policy-digest", ""), adapter_digest(tensors, config)
    if came is not None and came != digest:
        raise DigestMismatch(f"The server exported {digest}, but the file that came has {came}: do not use it.")
    format = format or ("peft" if "peft_type" in config else "mlx")
    return ExportedAdapter(body=reply.body, tensors=tensors, config=config, digest=digest, format=format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """What a push would make true."""

    place: Place
    digest: str
    mode: str
    label: str | None
    activate: bool


def look(sought: Sought) -> Call[PublishedVersion | Call[PublishedVersion] | None]:
    """Finds out what is still to do for `sought`: nothing (the version), a move of the name (a call), or an upload
    (None). The server calls a push unchanged in just these cases, if the label is the same."""
    return Call(
        method="GET",
        path=sought.place.path(),
        query=sought.place.query,
        parse=partial(_left_to_do, sought),
        idempotent=True,
        accepts=(404,),
    )


def _left_to_do(sought: Sought, reply: Reply) -> PublishedVersion | Call[PublishedVersion] | None:
    if reply.status == 404:
        return None
    line = parse_policy(reply)
    found = _same(line, sought)
    # without an instance nobody could say later which server's number this was
    if found is None or line.instance is None or (sought.label is not None and sought.label != found.label):
        return None
    if found.live or not sought.activate:
        return _published(line.name, found, line.instance, live=found.live)
    return _activation(sought, found.version)


def _same(line: PolicyLine, sought: Sought) -> KeptVersion | None:
    """The live version, else the newest one, if it has these weights in this mode. An older one would be a new version
    if it were pushed."""
    newest = max(line.versions, key=lambda version: version.version, default=None)
    live = next((version for version in line.versions if version.live), None)
    for version in (live, newest):
        if version is not None and (version.digest, version.mode) == (sought.digest, sought.mode):
            return version
    return None


def _published(name: str, found: KeptVersion, instance: str, *, live: bool) -> PublishedVersion:
    return PublishedVersion(
        name=name,
        version=found.version,
        digest=found.digest,
        label=found.label,
        live=live,
        unchanged=True,
        verified=True,
        instance=instance,
        kind=found.kind,
        mode=found.mode,
        nbytes=found.nbytes,
    )


def _activation(sought: Sought, version: int) -> Call[PublishedVersion]:
    """Moves the name; the version is one that the server had, so the push as a whole changed no weights."""

    def parse(reply: Reply) -> PublishedVersion:
        return replace(parse_published(reply, sent_digest=sought.digest), unchanged=True, mode=sought.mode)

    return Call(
        method="POST",
        path=f"{sought.place.path()}/activate",
        query=sought.place.query,
        parse=parse,
        headers={"content-type": "application/json"},
        body=Body((json.dumps({"version": version}).encode(),)),
        idempotent=True,
    )
