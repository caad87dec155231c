"""Where replicas join: whoever asks for a link has to prove that it has the key, and is then served as any other."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.errors import EngineUnavailable, Forbidden, RolloutError
from rollout_server.fleet.codec.frames import BadFrame, Codec
from rollout_server.fleet.joining.challenge import (
    HANDSHAKE_S,
    LONGEST_GREETING,
    NONCE_HEADER,
    TLS_HEADER,
    UPGRADE,
    Challenge,
    certificate_of,
    is_nonce,
    nonce,
)
from rollout_server.fleet.link import BUFFER, FLUSH_S, Link
from rollout_server.fleet.roster import Roster
from rollout_server.fleet.wire import Dismissed, Introduce, Refused, Welcome, greeting_codec
from rollout_server.quoting import quoted
from rollout_server.rollout import NAME_PATTERN

log = logging.getLogger("rollout_server.fleet")

MOST_STRANGERS = 64
"""Links that may be open at once without having proved anything yet."""
FORGET_S = 600.0
"""A replica that left and did not come back is listed as dead for so long."""
BROKEN = (OSError, TimeoutError, asyncio.IncompleteReadError, BadFrame, ssl.SSLError)


@dataclass(frozen=True, slots=True)
class Lock:
    """What a replica needs in order to come in. Without a key only this machine's own do."""

    key: str | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def context(self) -> ssl.SSLContext | None:
        """What encrypts links; None where nothing does. Raises `OSError` for files that cannot be used."""
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.private_key)
        return context


class Door:
    """A `Source` that starts nothing. HTTP's connections bring it those that ask; `is_local` says of an address
    whether it is this machine's."""

    def __init__(self, lock: Lock, is_local: Callable[[str], bool]) -> None:
        self._lock = lock
        self._context = lock.context()
        self._certificate = certificate_of(lock.certificate) if lock.certificate else b""
        self._is_local = is_local
        self._codec: Codec | None = None
        self._roster: Roster | None = None
        self._instance = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._greetings = greeting_codec()
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, str] = {}
        """What the process has drawn that each id is served for."""
        self._parted: dict[tuple[str, str], Dismissed] = {}
        """The last word to each process that was let go: a link that is cut may have lost it."""
        self._strangers = 0

    def source(self, options: EngineOptions, codec: Codec) -> Door:
        """The fleet's source. Replicas have options of their own, which the fleet's terms are compared with."""
        self._codec = codec
        return self

    def belongs_to(self, instance: str) -> None:
        """Says whose versions are numbered here."""
        self._instance = instance

    def start(self, roster: Roster) -> None:
        self._roster = roster

    async def stop(self) -> None:
        """Replicas end what they have, close their links, and try to come back."""
        self._roster = None
        if self._tasks:
            await asyncio.wait(self._tasks)

    def enter(self, transport: asyncio.Transport, early: bytes, drawn: str) -> None:
        """Takes over a connection on which a replica has asked for a link. `early` came behind that, `drawn` is its
        nonce."""
        if self._roster is None or self._codec is None or self._strangers >= MOST_STRANGERS or not is_nonce(drawn):
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            transport.close()
            return
        task = asyncio.get_running_loop().create_task(self._take(transport, early, drawn, self._roster, self._codec))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, transport: asyncio.Transport, early: bytes, drawn: str, roster: Roster, codec: Codec) -> None:
        self._strangers += 1
        with ExitStack() as unless_let_in:
            # Whatever a stranger's bytes bring about, it keeps no descriptor of this process.
            unless_let_in.callback(transport.abort)
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    link, who, welcome = await self._introduced(transport, early, drawn, codec)
            except BROKEN as error:
                log.warning("A replica at %s did not introduce itself: %r", transport.get_extra_info("peername"), error)
                return
            except RolloutError as error:
                log.warning("A replica at %s was refused: %s", transport.get_extra_info("peername"), error)
                asyncio.get_running_loop().call_later(FLUSH_S, transport.abort)
                unless_let_in.pop_all()
                return
            finally:
                self._strangers -= 1
            unless_let_in.pop_all()
        if (last := self._parted.get((who.id, who.process))) is not None:
            await self._dismiss(who.id, link, welcome, last)
        else:
            await self._serve(who, link, welcome, roster)

    async def _introduced(
        self, transport: asyncio.Transport, early: bytes, drawn: str, codec: Codec
    ) -> tuple[Link, Introduce, Welcome]:
        """Raises what is wrong with it, which it has been told then."""
        challenge = Challenge(drawn, nonce(), self._certificate)
        address = str((transport.get_extra_info("peername") or ("",))[0])
        link = await self._opened(transport, early, challenge, codec)
        said = await link.greeting(LONGEST_GREETING, self._greetings)
        try:
            if not isinstance(said, Introduce):
                raise EngineUnavailable("A replica begins by saying who it is.")
            if self._lock.key is None and not self._is_local(address):
                raise Forbidden(
                    f"The controller has no key, so it takes no replica from {address}: set ROLLOUT_FLEET_KEY on both."
                )
            if not challenge.holds(said.proof, self._lock.key, "replica", said.id):
                raise Forbidden("The key of the replica is not the fleet's: set ROLLOUT_FLEET_KEY to the controller's.")
            if not NAME_PATTERN.fullmatch(said.id):
                raise Forbidden(f"A replica cannot be called {quoted(said.id)}.")
            self._check_process(said)
        except RolloutError as error:
            link.send(Refused(error))
            link.kill()
            raise
        return link, said, Welcome(self._instance, challenge.proof(self._lock.key, "controller", said.id))

    def _check_process(self, who: Introduce) -> None:
        """Raises `EngineUnavailable`, after which a replica asks again, where another one is served by its name."""
        if self._processes.get(who.id, who.process) != who.process:
            raise EngineUnavailable(
                f"Another process is called {who.id}, too, and its link is open: give each machine or container a host "
                "name of its own. One that was started in its place is let in once that link has closed."
            )

    async def _opened(self, transport: asyncio.Transport, early: bytes, challenge: Challenge, codec: Codec) -> Link:
        """Says yes to the request, and speaks frames from then on, encrypted where there is a certificate."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=BUFFER)
        protocol = asyncio.StreamReaderProtocol(reader)
        tls = "off" if self._context is None else "on"
        transport.write(
            f"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {UPGRADE}\r\n"
            f"{NONCE_HEADER}: {challenge.controller}\r\n{TLS_HEADER}: {tls}\r\n\r\n".encode()
        )
        if self._context is None:
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
            reader.feed_data(early)
            return Link(reader, asyncio.StreamWriter(transport, protocol, reader, loop), codec)
        secured = await loop.start_tls(transport, protocol, self._context, server_side=True)
        if secured is None:
            raise ConnectionResetError("the link was closed")
        protocol.connection_made(secured)
        return Link(reader, asyncio.StreamWriter(secured, protocol, reader, loop), codec)

    async def _dismiss(self, id: str, link: Link, welcome: Welcome, last: Dismissed) -> None:
        """Says once more what a link that was cut may have lost, and waits for the replica to close this one."""
        log.info("Replica %s is told again that it was let go.", id)
        link.send(welcome)
        link.send(last)
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                while await link.receive() is not None:
                    pass
        except BROKEN as error:
            log.warning("Replica %s, which was let go, did not close its link: %r", id, error)
        finally:
            link.kill()

    async def _serve(self, who: Introduce, link: Link, welcome: Welcome, roster: Roster) -> None:
        """Runs it. One that comes again has lost its earlier link, whether that is known here or not."""
        id, loop = who.id, asyncio.get_running_loop()
        # Several may wait for one link to end: each looks again, since another may have been first.
        while (before := self._serving.get(id)) is not None:
            try:
                self._check_process(who)
            except EngineUnavailable as error:
                link.send(Refused(error))
                link.kill()
                return
            roster.end(id, "it has joined anew")
            await asyncio.wait([before])
        task = asyncio.current_task()
        if task is not None:
            self._serving[id], self._processes[id] = task, who.process
        try:
            log.info("Replica %s joins.", id)
            await roster.serve(id, link, welcome)
            log.warning("Replica %s has left; its rows are drawn again elsewhere.", id)
            loop.call_later(FORGET_S, roster.forget, id)
        except RolloutError as error:
            log.warning("%s", error)
            roster.forget(id)
        finally:
            del self._serving[id], self._processes[id]
            if (last := roster.last_word(id)) is not None:
                self._parted[id, who.process] = last
                loop.call_later(FORGET_S, self._parted.pop, (id, who.process), None)
