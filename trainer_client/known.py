"""Does the server hold these weights already? Asked of the server before each upload, never remembered: another client
may have moved the name, a version may have been freed, the server may be another one since its restart."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial

from trainer_client.body import Body
from trainer_client.call import Call
from trainer_client.names import path_of
from trainer_client.parsing import parse_policy, parse_published
from trainer_client.replies import Reply
from trainer_client.versions import KeptVersion, PolicyLine, PublishedVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """What a push would make true."""

    name: str
    digest: str
    mode: str
    label: str | None
    activate: bool


def look(sought: Sought) -> Call[PublishedVersion | Call[PublishedVersion] | None]:
    """Finds out what is still to do for `sought`: nothing (the version), a move of the name (a call), or an upload
    (None). The server calls a push unchanged in just these cases, if the label is the same."""
    return Call(
        method="GET",
        path=path_of(sought.name),
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
        path=f"{path_of(sought.name)}/activate",
        parse=parse,
        headers={"content-type": "application/json"},
        body=Body((json.dumps({"version": version}).encode(),)),
        idempotent=True,
    )
