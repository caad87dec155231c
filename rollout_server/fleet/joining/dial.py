"""A replica's way to its controller: the request for a link, its encryption, and who proves what to whom."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rollout_server.errors import Conflict, EngineUnavailable, Forbidden, InvalidField
from rollout_server.fleet.codec.frames import Codec
from rollout_server.fleet.joining.challenge import (
    HANDSHAKE_S,
    LONGEST_GREETING,
    NONCE_HEADER,
    PATH,
    TLS_HEADER,
    UPGRADE,
    Challenge,
    nonce,
)
from rollout_server.fleet.link import BUFFER, Link
from rollout_server.fleet.wire import Introduce, Refused, Welcome, greeting_codec

BUSY = 503


@dataclass(frozen=True, slots=True)
class Controller:
    """Where a fleet takes replicas. `encrypted` refuses a controller that has no certificate; `trusted` is a file of
    certificates to trust in the place of the system's."""

    host: str
    port: int
    encrypted: bool = False
    key: str | None = None
    trusted: Path | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.encrypted else 'http'}://{host}:{self.port}"

    def context(self) -> ssl.SSLContext:
        """What checks its certificate. Raises `InvalidField` for a file that holds none to trust."""
        try:
            return ssl.create_default_context(cafile=self.trusted)
        except OSError as error:
            why = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else error
            raise InvalidField(
                f"--fleet-cert {self.trusted} holds no certificates that could be trusted: {why}.", param="fleet_cert"
            ) from error


async def dial(controller: Controller, id: str, codec: Codec, process: str = "") -> tuple[Link, Welcome]:
    """A link on which both sides know each other; `process` is what this one has drawn. Raises `Conflict` and
    `Forbidden` for what asking again does not mend, and `EngineUnavailable`, `OSError`, `TimeoutError`,
    `IncompleteReadError` or `BadFrame` for the rest."""
    async with asyncio.timeout(HANDSHAKE_S):
        reader, writer = await asyncio.open_connection(controller.host, controller.port, limit=BUFFER)
        with ExitStack() as unless_it_is_used:
            unless_it_is_used.callback(writer.transport.abort)
            found = await _introduced(controller, Introduce(id, "", process), codec, reader, writer)
            unless_it_is_used.pop_all()
        return found


async def _introduced(
    controller: Controller, who: Introduce, codec: Codec, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[Link, Welcome]:
    drawn = nonce()
    request = (
        f"GET {PATH} HTTP/1.1", f"host: {controller.host}:{controller.port}", "connection: upgrade",
        f"upgrade: {UPGRADE}", f"{NONCE_HEADER}: {drawn}", "", "",
    )  # fmt: skip
    writer.write("\r\n".join(request).encode())
    headers = await _headers(controller, reader)
    certificate = b""
    if headers.get(TLS_HEADER) == "on":
        certificate = await _encrypted(controller, writer)
    elif controller.encrypted:
        raise Conflict(f"{controller.url} has no certificate: start it with --fleet-cert, or join it by http://.")
    challenge = Challenge(drawn, headers.get(NONCE_HEADER, ""), certificate)
    link = Link(reader, writer, codec)
    link.send(replace(who, proof=challenge.proof(controller.key, "replica", who.id)))
    said = await link.greeting(LONGEST_GREETING, greeting_codec())
    if isinstance(said, Refused):
        raise said.error
    if not isinstance(said, Welcome) or not challenge.holds(said.proof, controller.key, "controller", who.id):
        raise Forbidden(
            f"{controller.url} has not shown that it has this replica's key: set ROLLOUT_FLEET_KEY to the same on both."
        )
    return link, said


async def _headers(controller: Controller, reader: asyncio.StreamReader) -> dict[str, str]:
    """Those of a controller that agrees."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    status = int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0
    if status == BUSY:
        raise EngineUnavailable(f"{controller.url} takes no replicas yet.")
    if status != 101:
        raise Conflict(f"{controller.url} takes no replicas (it answered {first!r}): start it with serve --fleet.")
    pairs = (line.partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _encrypted(controller: Controller, writer: asyncio.StreamWriter) -> bytes:
    """Encrypts the link; returns the certificate that the controller has shown."""
    try:
        await writer.start_tls(controller.context(), server_hostname=controller.host)
    except ssl.SSLCertVerificationError as error:
        raise Forbidden(
            f"The certificate of {controller.url} is not trusted ({error.verify_message}): give its issuer by "
            "--fleet-cert, or join it by a name that it is for."
        ) from error
    return writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
