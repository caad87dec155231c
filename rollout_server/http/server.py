"""`serve`: the application behind a socket, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import uvicorn
from litestar import Litestar

from rollout_server import logs
from rollout_server.config import ServerConfig
from rollout_server.errors import EngineUnavailable
from rollout_server.http.app import create_app
from rollout_server.http.residents import RESIDENTS_KEY, Residents
from rollout_server.http.sockets.connection import Connection
from rollout_server.http.sockets.listening import Listener, quietly
from rollout_server.http.sockets.unusable import unusable
from rollout_server.machine.blas import one_thread_for_numpy
from rollout_server.open_files import raise_limit

log = logging.getLogger("rollout_server.http")

BACKLOG = 2048
"""Connections that may wait to be accepted: a trainer opens hundreds at once."""
KEEP_ALIVE_S = 75
"""Seconds; longer than clients keep idle connections, so that the client closes them, and never the server under a
request."""
SWITCH_S = 0.0005
"""Seconds for which a thread keeps Python from the others. The engine's comes back to it several times a step, and
would wait for Python's usual 5 ms each time that a push is read or a reply is written beside it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def announce(url: str) -> None:
    """The line that a person waits for, or a process that started the server."""
    sys.stdout.write(f"rollout-server is ready at {url}\n")
    sys.stdout.flush()


def takes_replicas(url: str) -> None:
    """What a controller says before it is ready, since that takes replicas."""
    sys.stdout.write(f"rollout-server takes replicas at {url}: start them by rollout-server serve --join {url}\n")
    sys.stdout.flush()


def serve(config: ServerConfig, *, ready: Callable[[str], None] = announce) -> None:
    """Runs until SIGTERM or SIGINT, then ends open requests by name and returns. `ready` is called with the URL when
    the model and the adapters are loaded. Raises `RolloutError` if they cannot be, or the address is taken."""
    logs.configure(config.log_format)
    raise_file_limit()
    one_thread_for_numpy()
    sys.setswitchinterval(SWITCH_S)
    serve_app(lambda: create_app(config), config, ready)


def serve_app(make: Callable[[], Litestar], config: ServerConfig, ready: Callable[[str], None]) -> None:
    """`serve` for the application that `make` makes, once the address is ours: it may download a model first. It is the
    last that its process does: signals that still come are passed over, or they would end it with a trace."""
    with bound_socket(config) as listener:
        asyncio.run(StoppableServer(make(), config, listener, ready).until_stopped())
    if _in_main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def served(config: ServerConfig, make: Callable[[ServerConfig], Litestar] = create_app) -> Iterator[str]:
    """A server in a thread of this process, for as long as the context lasts: yields its URL once it is ready. `make`
    gives the application. Raises as `serve` does."""
    ready: Future[str] = Future()
    with bound_socket(config) as listener, ThreadPoolExecutor(1, "server") as pool:
        server = StoppableServer(make(config), config, listener, ready.set_result)
        running = pool.submit(lambda: asyncio.run(server.until_stopped()))
        # Whoever asks a server that has died is refused, instead of waiting in the backlog of its socket.
        running.add_done_callback(lambda _: listener.close())
        try:
            either: tuple[Future[Any], ...] = (ready, running)
            wait(either, return_when=FIRST_COMPLETED)
            if not ready.done():
                running.result()
                raise EngineUnavailable("The server ended before it was ready.")
            yield ready.result()
        finally:
            server.should_exit = True
        running.result()


@contextmanager
def bound_socket(config: ServerConfig) -> Iterator[socket.socket]:
    """Bound before anything is loaded, so that a taken port fails at once and port 0 has a number."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = Listener(family, kind, protocol)
    except OSError as error:
        raise EngineUnavailable(unusable(config.host, config.port, error)) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise EngineUnavailable(unusable(config.host, config.port, error)) from error
        yield listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit() -> None:
    """A client is an open file, and some systems allow 256."""
    files = raise_limit()
    if files.few:
        log.warning(
            "Here %s; those beyond are answered 503. A higher hard limit (ulimit -Hn, LimitNOFILE) allows more.", files
        )


class StoppableServer(uvicorn.Server):
    """uvicorn, but open requests are ended by the engine before connections are waited for, and a signal that was
    obeyed is not raised again."""

    def __init__(
        self, app: Litestar, config: ServerConfig, listener: socket.socket, ready: Callable[[str], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                log_config=None,
                access_log=False,
                lifespan="on",
                http=Connection,
                ws="none",
                server_header=False,
                proxy_headers=False,
            )
        )
        self._residents: Residents = app.state[RESIDENTS_KEY]
        self._service = self._residents.base
        self._listener = listener
        self._ready = ready
        self._patience_s = config.shutdown_s
        self._starting: asyncio.Task[None] | None = None
        self._told_to_stop = False

    async def until_stopped(self) -> None:
        """Serves until a signal comes, or the start fails: then its error is raised, unless a signal came first."""
        asyncio.get_running_loop().set_exception_handler(quietly)
        await self.serve(sockets=[self._listener])
        if self._starting is None or not self._starting.done():
            return
        fault = None if self._starting.cancelled() else self._starting.exception()
        if fault is not None and not self._told_to_stop:
            raise fault

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._service.config.fleet:
            takes_replicas(url_of(self._listener))
        self._starting = asyncio.create_task(self._wait_ready())

    async def _wait_ready(self) -> None:
        ready = False
        try:
            await self._residents.started()
            ready = True
        finally:
            self.should_exit = self.should_exit or not ready
        url = url_of(self._listener)
        for info in (service.info for service in self._residents.every):
            log.info("%s (%s, %s, cache %s) is ready at %s", info.id, info.dtype, info.device, info.cache, url)
        self._ready(url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Only the main thread hears signals. They are heard until the loop has closed.
        if _in_main_thread():
            for number in SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self._told_to_stop = self._told_to_stop or not self.should_exit
        if self.should_exit and self._connections:
            log.info("Stopping at once: connections are cut.")
            self._cut()
        self.should_exit = True

    @property
    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    def _cut(self) -> None:
        """Whoever waits for one of them goes on: uvicorn would cancel them, each with its traces in the log."""
        for connection in self._connections:
            connection.transport.abort()

    def _patience_ends(self) -> None:
        log.warning(
            "%d replies were not read to their end within %g s: their connections are cut.",
            len(self._connections),
            self._patience_s,
        )
        self._cut()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        log.info("Stopping: open requests end now.")
        self._service.stopping.set()
        for connection in self._connections:
            connection.stop_reading()
        await self._residents.close()
        patience = asyncio.get_running_loop().call_later(self._patience_s, self._patience_ends)
        await super().shutdown(sockets)
        patience.cancel()
