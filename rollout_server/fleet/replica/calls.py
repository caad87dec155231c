"""Calls one after another, on a thread that no process waits for when it ends, unlike one of `concurrent.futures`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, TypeVar

from rollout_server.engine.blame import Blame

P = ParamSpec("P")
T = TypeVar("T")
Waiting = tuple[Future[object], Callable[[], object]]


class CallsInOrder:
    """What is submitted is called in its order."""

    def __init__(self, name: str) -> None:
        self._waiting: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._stopped = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
        """What the call will have returned or raised. Cancelled if it has not begun when it is stopped."""
        future: Future[T] = Future()
        self._waiting.put((future, lambda: call(*args, **options)))  # type: ignore[arg-type]
        return future

    def stop(self) -> None:
        """What has not begun is cancelled; what has is not waited for."""
        self._stopped = True
        self._waiting.put(None)

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            future, call = waiting
            if self._stopped:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            found: list[object] = []
            error = Blame().attempt(partial(_append, found, call))
            if error is None:
                future.set_result(found[0])
            else:
                future.set_exception(error)


def _append(found: list[object], call: Callable[[], object]) -> None:
    found.append(call())
