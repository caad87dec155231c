"""Changes to versions, in their order: on disk first where there is a state directory, then in the engine.

Without one a change is one engine command. With one, changes go one at a time: a pushed version is staged, written,
and only then does the alias move; nothing is answered before it is durable. Files are written on a thread of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from adapters.bundle import AdapterBundle
from adapters.prepare import PreparedBundle, prepare
from adapters.spec import AdapterError, Mode
from adapters.store import NameRecord, StateStore, StoreError, VersionRecord
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages import (
    Activate,
    Delete,
    Deleted,
    Pin,
    Pinned,
    PolicyStatus,
    Publish,
    Published,
    Restore,
    RestoredVersion,
)
from rollout_server.errors import EngineUnavailable, InvalidField, RolloutError, StorageFailed
from rollout_server.http.problems import from_adapters

log = logging.getLogger("rollout_server.http")

T = TypeVar("T")
C = TypeVar("C", Pin, Delete)


class Publisher:
    """The one way by which versions change. Belongs to one event loop."""

    def __init__(self, engine: EngineHandle, store: StateStore | None) -> None:
        self._engine = engine
        self._store = store
        self._lock = asyncio.Lock()
        self._restored = store is None
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def restored(self) -> bool:
        """Whether the versions of the state directory are there: before that, nothing can be said of any name."""
        return self._restored

    async def close(self) -> None:
        """After the engine has closed: changes that are under way end, and the directory is free for others."""
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._store is not None:
            self._store.close()

    async def publish(self, publish: Publish) -> Published:
        if self._store is None:
            return await self._engine.publish(publish)
        return await self._in_turn(self._publish(publish, self._store))

    async def activate(self, activate: Activate) -> Published:
        if self._store is None:
            return await self._engine.activate(activate)
        return await self._in_turn(self._activate(activate, self._store))

    async def pin(self, pin: Pin) -> Pinned:
        if self._store is None:
            return await self._engine.pin(pin)
        return await self._in_turn(self._then_written(self._engine.pin, pin, self._store))

    async def delete(self, delete: Delete) -> Deleted:
        if self._store is None:
            return await self._engine.delete(delete)
        return await self._in_turn(self._then_written(self._engine.delete, delete, self._store))

    async def restore(self) -> tuple[str, ...]:
        """Puts back what the state directory holds; returns the names. Raises `InvalidField` where it is for another
        base, and what the engine says to versions that it has no room for."""
        store = self._store
        if store is None:
            return ()
        try:
            await asyncio.to_thread(store.adopt, self._engine.info.digest)
        except StoreError as error:
            raise InvalidField(error.message, param="state_dir") from error
        for name in sorted(store.records):
            record, bundles = await asyncio.to_thread(store.load, name)
            prepared = [
                await self._prepared(bundle, v.mode) for v, bundle in zip(record.versions, bundles, strict=True)
            ]
            versions = tuple(
                RestoredVersion(
                    v.number, ready.bundle, v.label, v.created, v.number == record.live, v.pinned, v.mode, ready
                )
                for v, ready in zip(record.versions, prepared, strict=True)
            )
            await self._engine.restore(Restore(self._engine.new_id("restore"), name, record.last, versions))
            live = "deleted" if not versions else "nothing live" if record.live is None else f"@{record.live} live"
            log.info("%s was restored: %d versions, %s", name, len(versions), live)
        self._restored = True
        return tuple(name for name in store.records if store.records[name].versions)

    async def _prepared(self, bundle: AdapterBundle, mode: Mode) -> PreparedBundle:
        info = self._engine.info
        try:
            return await asyncio.to_thread(prepare, bundle, info.dtype, mode=mode, parameters=info.weights)
        except AdapterError as error:
            raise from_adapters(error) from error

    # ---- one at a time ----------------------------------------------------------------------------------------------

    async def _in_turn(self, change: Coroutine[Any, Any, T]) -> T:
        """A client that leaves must not leave a change half done."""
        if not self._restored:
            change.close()  # or Python warns that it was never awaited
            raise EngineUnavailable("The state directory is still being restored; try again in a moment.")

        async def run() -> T:
            async with self._lock:
                return await change

        task = asyncio.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _publish(self, publish: Publish, store: StateStore) -> Published:
        digest, name = publish.bundle.digest, publish.name
        began = time.perf_counter()
        await self._write(store.put, publish.bundle)
        put_s = time.perf_counter() - began
        try:
            staged = await self._engine.publish(replace(publish, activate=False))
        except RolloutError:
            await self._write(store.forget, digest)
            raise
        number = staged.version.number
        moves = publish.activate and not staged.live
        began = time.perf_counter()
        try:
            await self._write(store.write, self._record(name, live=number if moves else None))
        except StorageFailed:
            if not staged.unchanged:
                await self._engine.delete(Delete(self._engine.new_id("delete"), name, number))
            raise
        written = replace(staged, persist_ms=1e3 * (put_s + time.perf_counter() - began))
        if not moves:
            return written
        moved = await self._engine.activate(Activate(self._engine.new_id("activate"), name, number))
        return replace(written, live=moved.live, activate_ms=staged.activate_ms + moved.activate_ms)

    async def _activate(self, activate: Activate, store: StateStore) -> Published:
        # Asked first, so that nothing is written of a move that will be refused.
        await self._engine.activate(replace(activate, id=self._engine.new_id("check"), check_only=True))
        began = time.perf_counter()
        await self._write(store.write, self._record(activate.name, live=activate.number))
        persist_ms = 1e3 * (time.perf_counter() - began)
        try:
            moved = await self._engine.activate(activate)
        except RolloutError:
            # The last row of a version that only rows kept may end in between.
            await self._write(store.write, self._record(activate.name))
            raise
        return replace(moved, persist_ms=persist_ms)

    async def _then_written(self, verb: Callable[[C], Coroutine[Any, Any, T]], command: C, store: StateStore) -> T:
        """For changes that move no alias to other weights."""
        done = await verb(command)
        await self._write(store.write, self._record(command.name))
        return done

    async def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            await asyncio.to_thread(write, *arguments)
        except OSError as error:
            log.error("The state directory could not be written: %s", error)
            raise StorageFailed(f"The state directory could not be written: {error}. Nothing was made live.") from error

    def _record(self, name: str, live: int | None = None) -> NameRecord:
        """What the engine has of a name now, with its alias at `live` if given."""
        found = next((policy for policy in self._engine.status.policies if policy.name == name), None)
        if found is None:
            return NameRecord(name, self._last(name), None)
        return record_of(found, live)

    def _last(self, name: str) -> int:
        known = self._store.records.get(name) if self._store is not None else None
        return known.last if known else 0


def record_of(policy: PolicyStatus, live: int | None = None) -> NameRecord:
    versions = tuple(
        VersionRecord(
            status.version.number,
            status.version.digest,
            status.mode,
            status.version.label,
            status.pinned,
            status.created,
        )
        for status in policy.versions
    )
    alias = live if live is not None else policy.live.number if policy.live else None
    return NameRecord(policy.name, policy.last, alias, versions)
