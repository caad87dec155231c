"""The verbs for versions that are already there: pin, delete, export. Pure functions, as in `calls.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from trainer_client.call import Call
from trainer_client.container import HostTensor, read_container
from trainer_client.digest import adapter_digest
from trainer_client.encoding import json_body
from trainer_client.errors import BadReply, DigestMismatch
from trainer_client.names import path_of
from trainer_client.parsing import parse_kept_version
from trainer_client.replies import Reply, need, parse_json
from trainer_client.tensors import CONFIG_FILE, WEIGHT_FILES
from trainer_client.versions import KeptVersion

Format = Literal["peft", "mlx"]


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


def pin(name: str, version: int, pinned: bool = True) -> Call[KeptVersion]:
    """Keeps a version whatever its age, or with `pinned` False no longer. Raises `VersionGone` if it was freed."""
    return Call(
        method="PATCH",
        path=path_of(name, version),
        parse=lambda reply: parse_kept_version(parse_json(reply.body), f"policy {name!r}"),
        headers={"content-type": "application/json"},
        body=json_body({"pinned": pinned}),
        idempotent=True,
    )


def delete(name: str, version: int) -> Call[Deletion]:
    """Deletes a version; rows that use it run on. Raises `Conflict` if it is live, `VersionGone` if it was freed.

    Not repeated when the connection is lost: the version may be gone then."""
    return Call(method="DELETE", path=path_of(name, version), parse=_parse_deletion)


def delete_policy(name: str) -> Call[Deletion]:
    """Deletes a name with all its versions, the live one too. Raises `UnknownPolicy`."""
    return Call(method="DELETE", path=path_of(name), parse=_parse_deletion)


def export(name: str, version: int, *, format: Format | None = None) -> Call[ExportedAdapter]:
    """The weights of a kept version as a file of PEFT or of mlx-lm; by default PEFT's for low-rank versions, and for
    dense ones a form of their own; those of kind `full` have mlx-lm's too. Raises `VersionGone` if it was freed,
    `Conflict` where the format cannot say what the version is, `DigestMismatch` where other weights came than were
    stored."""
    return Call(
        method="GET",
        path=f"{path_of(name, version)}/export",
        query={} if format is None else {"format": format},
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
