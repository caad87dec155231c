"""What policies may be called, and changes to their versions: on disk first if there is a state directory, then in the
engine.

Without one a change is one engine command. With one, changes go one at a time: what the directory will say is written
first, and only then does the engine do it, so a disk that fails changes nothing, and nothing is answered before it is
durable. A pushed version is staged before, provisionally, since it may not fit. Files are written on another thread.
On a full disk nothing can be pushed, but whatever needs no more room can be done: the store keeps a reserve for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterError
from adapters.prepare import PreparedBundle, prepare
from adapters.spec import Mode
from adapters.versions.store import NameRecord, StateStore, StoreError
from rollout_server.adapter_errors import from_adapters
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.versions import (
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
from rollout_server.quoting import quoted
from rollout_server.rollout import BASE, NAME_PATTERN, NAME_RULE
from rollout_server.versions import predicted_records

log = logging.getLogger("rollout_server.http")

T = TypeVar("T")
C = TypeVar("C", Activate, Pin, Delete)


def check_name(name: str, base_id: str) -> None:
    """Raises `InvalidField` unless a policy may be called so."""
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidField(f"{quoted(name)} is not a policy name, which is {NAME_RULE}.", param="name")
    if name in (BASE, base_id):
        raise InvalidField(f"{quoted(name)} is what the base is called; choose another name.", param="name")


class VersionObserver(Protocol):
    """What is told of every change, by whatever door it came: requests, options of the start, a state directory."""

    def published(self, publish: Publish, published: Published) -> None: ...

    def restored(self, name: str, versions: Sequence[RestoredVersion]) -> None: ...

    def moved(self, name: str, number: int | None) -> None:
        """The alias was moved to this version; to none, where the name was deleted."""


class Unobserved:
    """Nobody looks."""

    def published(self, publish: Publish, published: Published) -> None:
        pass

    def restored(self, name: str, versions: Sequence[RestoredVersion]) -> None:
        pass

    def moved(self, name: str, number: int | None) -> None:
        pass


def timings_of(publish: Publish, published: Published) -> dict[str, float]:
    """What each phase of a push took, in milliseconds: those before it came here, then those of the engine and disk."""
    before = {phase: round(1e3 * (end - begin), 3) for phase, begin, end in publish.before}
    own = {"stage": round(published.stage_ms, 3), "activate": round(published.activate_ms, 3)}
    return before | own | ({} if published.persist_ms is None else {"persist": round(published.persist_ms, 3)})


class Publisher:
    """The one way by which versions change. Belongs to one event loop."""

    def __init__(
        self,
        engine: EngineHandle,
        store: StateStore | None,
        keep_versions: int,
        models: Collection[str] = (),
        observer: VersionObserver | None = None,
    ) -> None:
        """`models` are the names of those beside the base, which no policy may have."""
        self._engine = engine
        self._store = store
        self._keep = keep_versions
        self._models = models
        self._observer = observer or Unobserved()
        self._lock = asyncio.Lock()
        self.restored = store is None
        """True if the versions of the state directory are there: before that, nothing can be said of any name."""
        self._running: set[asyncio.Task[Any]] = set()

    def check_name(self, name: str) -> None:
        """Raises `InvalidField` unless a policy of this model may be called so."""
        check_name(name, self._engine.info.id)
        if name in self._models:
            raise InvalidField(f"{quoted(name)} is what a model is called here; choose another name.", param="name")

    async def close(self) -> None:
        """Lets changes that are under way end and frees the directory for others. To be called once the engine has
        closed."""
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._store is not None:
            self._store.close()

    async def publish(self, publish: Publish) -> Published:
        if self._store is None:
            published = await self._engine.publish(publish)
        else:
            published = await self._in_turn(self._publish(publish, self._store))
        self._observer.published(publish, published)
        return published

    async def activate(self, activate: Activate) -> Published:
        if self._store is None:
            published = await self._engine.activate(activate)
        else:
            published = await self._in_turn(self._activate(activate, self._store))
        self._observer.moved(activate.name, published.version.number)
        return published

    async def pin(self, pin: Pin) -> Pinned:
        if self._store is None:
            return await self._engine.pin(pin)
        return await self._in_turn(self._pin(pin, self._store))

    async def delete(self, delete: Delete) -> Deleted:
        if self._store is None:
            deleted = await self._engine.delete(delete)
        else:
            deleted = await self._in_turn(self._delete(delete, self._store))
        if delete.number is None:
            self._observer.moved(delete.name, None)
        return deleted

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
        if clash := sorted(store.records.keys() & set(self._models)):
            raise InvalidField(
                f"The state directory holds versions of the policy {clash[0]}, and --also calls a model so: give that "
                "model another name.",
                param="also",
            )
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
            await self._engine.restore(
                Restore(self._engine.new_id("restore"), name, record.last, versions, record.gone)
            )
            self._observer.restored(name, versions)
            live = "deleted" if not versions else "nothing live" if record.live is None else f"@{record.live} live"
            log.info("%s was restored: %d versions, %s", name, len(versions), live)
        self.restored = True
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
        if not self.restored:
            change.close()  # or Python warns that it was never awaited
            raise EngineUnavailable("The state directory is still being restored; try again in a moment.")

        async def run() -> T:
            try:
                async with self._lock:
                    return await change
            finally:
                change.close()  # or Python warns of one that was cancelled before its turn

        task = asyncio.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _publish(self, publish: Publish, store: StateStore) -> Published:
        digest, name = publish.bundle.digest, publish.name
        began = time.perf_counter()
        await self._write(store.put, publish.bundle)
        put = time.perf_counter()
        try:
            before = (*publish.before, ("persist", began, put))
            staged = await self._engine.publish(replace(publish, provisional=True, before=before))
        except RolloutError:
            await asyncio.to_thread(store.forget, digest)
            raise
        number = staged.version.number
        put_s, began = put - began, time.perf_counter()
        try:
            shown = self._shown(name)
            if shown is not None:
                record = predicted_records.published(
                    shown, number, self._keep, activate=publish.activate, label=publish.label
                )
                await self._write(store.write, record)
        except StorageFailed:
            if not staged.unchanged:
                await self._engine.delete(Delete(self._engine.new_id("delete"), name, number))
            await self._settle(name, store, number)
            await asyncio.to_thread(store.forget, digest)
            raise
        written = time.perf_counter()
        persist_s = put_s + written - began
        try:
            # It is known now, so this stages nothing and looks at no condition again.
            done = await self._engine.publish(replace(publish, before=(("persist", began, written),)))
        finally:
            await self._settle(name, store)
        return replace(done, unchanged=staged.unchanged, stage_ms=staged.stage_ms, persist_ms=1e3 * persist_s)

    async def _activate(self, activate: Activate, store: StateStore) -> Published:
        # Asked first, so that nothing is written of a move that will be refused.
        await self._engine.activate(replace(activate, id=self._engine.new_id("check"), check_only=True))
        began = time.perf_counter()
        shown = self._shown(activate.name)
        record = predicted_records.activated(shown, activate.number, self._keep) if shown else None
        moved, written = await self._after(record, self._engine.activate, activate, store)
        return replace(moved, persist_ms=1e3 * (written - began))

    async def _pin(self, pin: Pin, store: StateStore) -> Pinned:
        shown = self._shown(pin.name)
        record = predicted_records.pinned(shown, pin, self._keep) if shown else None
        return (await self._after(record, self._engine.pin, pin, store))[0]

    async def _delete(self, delete: Delete, store: StateStore) -> Deleted:
        shown = self._shown(delete.name)
        record = predicted_records.deleted(shown, delete) if shown else None
        return (await self._after(record, self._engine.delete, delete, store))[0]

    async def _after(
        self, record: NameRecord | None, verb: Callable[[C], Coroutine[Any, Any, T]], command: C, store: StateStore
    ) -> tuple[T, float]:
        """Writes `record` (None where the engine will refuse) and then has the engine do it; also returns when it was
        durable."""
        try:
            if record is not None:
                await self._write(store.write_in_reserve, record)
            written = time.perf_counter()
            done = await verb(command)
        finally:
            # A refusal too: the last row of a version that only rows kept may end in between.
            await self._settle(command.name, store)
        return done, written

    async def _settle(self, name: str, store: StateStore, last: int = 0) -> None:
        """Makes the directory say what the engine has, if that is not what was written, and removes weights of nobody.
        What fails here was not promised to anybody, and is made good by the next change or the next start. `last` is
        the newest number of a name that may have no versions."""
        shown = self._shown(name)
        record = predicted_records.record_of(shown) if shown else store.records.get(name)
        if record is None and store.doubts(name):
            record = NameRecord(name, last, None)  # Its first push failed, and may be on disk nevertheless.
        elif record is not None and record.last < last:
            record = replace(record, last=last)
        try:
            if record is not None and not store.says(record):
                await asyncio.to_thread(store.write_in_reserve, record)
            await asyncio.to_thread(store.sweep)
        except OSError as error:
            log.warning("The state directory has versions of %s that are no longer kept: %s", name, error)

    async def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            await asyncio.to_thread(write, *arguments)
        except OSError as error:
            log.error("The state directory could not be written: %s", error)
            raise StorageFailed(
                f"The state directory could not be written: {error}. Nothing changed; make room or mend the disk, and "
                "send it again."
            ) from error

    def _shown(self, name: str) -> PolicyStatus | None:
        """What the engine has of a name now; None for one without versions."""
        return next((policy for policy in self._engine.status.policies if policy.name == name), None)
