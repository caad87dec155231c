"""One connection: uvicorn's, but what is no HTTP is answered as every error is, a stop ends what is still being sent,
and one that is too many is told so."""

from __future__ import annotations

import asyncio
import http
import sys
from typing import Any

import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from rollout_server.errors import BadBody, EngineUnavailable, RolloutError
from rollout_server.fleet.joining.challenge import NONCE_HEADER, PATH, UPGRADE
from rollout_server.fleet.joining.door import Door
from rollout_server.http.problems import body_of, headers_of, row_of
from rollout_server.http.sockets.received import WholePieces
from rollout_server.open_files import OpenFiles
from rollout_server.quoting import shortened

DOOR_KEY = "door"
"""Key of the application's state: where replicas join its fleet."""
CROWDED = "crowded"
"""Key of the request's state where the connection is one of the last that fit."""
PATIENCE_S = 2.0
"""Seconds that one of the last connections may take to ask."""
LINGER_S = 1.0
"""How long a client that is still sending may take to read the reply: a socket that is closed with unread data resets
the connection, and the reply may be lost."""
REASON = 200
"""The most characters that are shown of what the parser says."""
HEAD_TOO_LONG = 431
READ_AT_ONCE = 1 << 18
"""Bytes, as asyncio has it."""
READ_AT_MOST = 1 << 21
"""Where more waits than that: each time costs a few hundred steps of Python, during which the engine's thread waits."""


def too_many() -> RolloutError:
    return EngineUnavailable(
        f"The server has as many connections open as it may ({OpenFiles.now()}); try again in a moment, over fewer."
    )


def raw_reply(error: RolloutError) -> bytes:
    """The whole reply where no request was read that an application could answer."""
    status, body = row_of(error).status, msgspec.json.encode(body_of(error))
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"{name}: {value}" for name, value in (headers | headers_of(error)).items()]
    return "\r\n".join([f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *lines, "", ""]).encode() + body


class Connection(H11Protocol):
    """Its private ones are ours; without an underscore they are uvicorn's."""

    _deaf = False
    """The last reply was given, and whatever still comes is dropped."""
    _ending = False
    """The next reply is the last."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn._receive_buffer = WholePieces()
        crowded = OpenFiles.now().crowded
        if crowded is not None and transport.get_extra_info("socket").fileno() >= crowded:
            self.app_state = {**self.app_state, CROWDED: True}
            self.loop.call_later(PATIENCE_S, self._refuse_the_idle)

    def _refuse_the_idle(self) -> None:
        cycle: Any = self.cycle
        if cycle is None and not self.transport.is_closing():
            self._last_word(too_many())

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        # asyncio's name for the most that it reads at once; on transports that have none it says nothing.
        transport: Any = self.transport
        transport.max_size = READ_AT_MOST if len(data) >= READ_AT_ONCE else READ_AT_ONCE
        cycle: Any = self.cycle
        if cycle is not None and not cycle.body:
            # uvicorn adds to it, and gives `bytes` of it away: of these, the first piece is itself in both cases.
            cycle.body = b""
        super().data_received(data)

    def _should_upgrade(self) -> bool:
        """A replica that joins a fleet speaks its own frames; whoever else offers something is answered as any
        other."""
        asked = self.scope["method"] == "GET" and self.scope["path"] == PATH
        return asked and self._get_upgrade() == UPGRADE.encode() and self._door is not None

    @property
    def _door(self) -> Door | None:
        """Where replicas join, if this server is a fleet's controller."""
        app: Any = self.app
        return app.state.get(DOOR_KEY) if hasattr(app, "state") else None

    def handle_websocket_upgrade(self, event: Any) -> None:
        """uvicorn's name for every upgrade: from here on the connection is the fleet's."""
        self.connections.discard(self)
        drawn = dict(self.headers).get(NONCE_HEADER.encode(), b"")
        if self._door is not None:
            self._door.enter(self.transport, self.conn.trailing_data[0], drawn.decode("latin-1"))

    def send_400_response(self, msg: str) -> None:
        """Called where h11 can make nothing of what was sent, in a body too."""
        fault = sys.exception()
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            # Who reads the body learns that no more will come; this connection has no other reply for it.
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        if getattr(fault, "error_status_hint", None) == HEAD_TOO_LONG:
            said = "The request cannot be read: its first line and its headers are too long."
        else:
            # What was sent is not repeated.
            reason = str(fault or msg).partition(": bytearray")[0].rstrip(".")
            said = f"The request cannot be read as HTTP: {shortened(reason, REASON)}."
        self._last_word(BadBody(said))

    def stop_reading(self) -> None:
        """The server stops: whoever is waiting for the rest of a body is woken, and finds that out."""
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            self._ending = True
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        self.stop_reading()
        if not (self._deaf or self._ending):
            super().shutdown()

    def on_response_complete(self) -> None:
        if self._ending and not self.transport.is_closing():
            self._linger()
        else:
            super().on_response_complete()

    def _last_word(self, error: RolloutError) -> None:
        self.transport.write(raw_reply(error))
        self._linger()

    def _linger(self) -> None:
        """Closes this direction now, and the other once the client has, or after a while."""
        self._deaf = True
        self.transport.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
