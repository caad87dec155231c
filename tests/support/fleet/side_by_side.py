"""A fleet and one engine of the same model, for tests that compare what they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rollout_server.engine.handle import EngineHandle

T = TypeVar("T")


class SideBySide:
    """Two handles on an event loop of their own. A coroutine that is not done after `within_s` fails its test."""

    def __init__(self, fleet: EngineHandle, one: EngineHandle, within_s: float) -> None:
        self.fleet, self.one, self._within_s = fleet, one, within_s
        self._loop = asyncio.new_event_loop()
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(self._loop.run_forever)
        self.run(self._start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(self._within_s)

    async def _start(self) -> None:
        for handle in (self.fleet, self.one):
            handle.start()
        for handle in (self.fleet, self.one):
            await handle.wait_ready()

    async def _close(self) -> None:
        await asyncio.gather(self.fleet.close(), self.one.close())

    def close(self) -> None:
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._pool.shutdown()
        self._loop.close()
