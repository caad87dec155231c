"""A state directory on a disk that fails when it is told to, and the publisher over it, turn by turn.

`Durable` stands between a player and its engine as the HTTP side does: a change goes through the real `Publisher` and
the real `StateStore`. Files are written when the player says so, and not on another thread, so that a sequence gives
the same result each time it is played. What the owner of the weights was told is held against what the engine has and
against what a restart would read from the directory.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from adapters.versions import store as store_module
from adapters.versions.store import NameRecord, StateStore
from rollout_server.engine.messages.rollouts import RequestFailed
from rollout_server.engine.messages.versions import Activate, Delete, Pin, PolicyReply, Publish
from rollout_server.errors import EngineFault, RolloutError, StorageFailed
from rollout_server.versions.publisher import Publisher
from tests.random_runs.expected_versions import Kept, Line
from tests.random_runs.invariants import Promises
from tests.support.engine.driver import Driver


class Disk(ThreadPoolExecutor):
    """Does what is handed to it when `work` is called. Of the file operations in there the next `good` ones work, and
    the `bad` ones after those fail."""

    def __init__(self) -> None:
        super().__init__(1)
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.good = self.bad = self.failures = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, functools.partial(fn, *args, **kwargs)))
        return future

    def work(self) -> None:
        future, job = self.jobs.popleft()
        try:
            with self._counted():
                result = job()
        except Exception as error:  # as an executor does: whoever waits gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    def heal(self) -> None:
        self.good = self.bad = 0

    @contextmanager
    def _counted(self) -> Iterator[None]:
        real = {name: getattr(Path, name) for name in ("open", "replace", "unlink")}
        with mock.patch.object(store_module, "_sync", lambda _: self._operation()):
            for name, method in real.items():
                setattr(Path, name, self._failing(method))
            try:
                yield
            finally:
                for name, method in real.items():
                    setattr(Path, name, method)

    def _failing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self._operation()
            return method(*args, **kwargs)

        return operation

    def _operation(self) -> None:
        if self.good:
            self.good -= 1
        elif self.bad:
            self.bad -= 1
            self.failures += 1
            raise OSError(errno.ENOSPC, "No space left on device")


class Noted(StateStore):
    """Keeps what the file of a name may say by now: what was written last, and what may have been since."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.possible: dict[str, list[NameRecord | None]] = {name: [record] for name, record in self.records.items()}
        self.failed = 0
        """Writes of names."""

    def write(self, record: NameRecord) -> None:
        if not self.says(record):
            self.possible.setdefault(record.name, [None]).append(record)
        try:
            super().write(record)
        except OSError:
            self.failed += 1
            raise
        self.possible[record.name] = [record]


class Face:
    """What a `Publisher` wants of an `EngineHandle`."""

    def __init__(self, driver: Driver, send: Callable[[Any], None]) -> None:
        self._driver = driver
        self._send = send
        self._read = 0
        self._replies: dict[str, asyncio.Future[Any]] = {}
        self.info = driver.model.info

    @property
    def status(self) -> Any:
        return self._driver.status

    def new_id(self, kind: str) -> str:
        self._driver.count += 1
        return f"/{kind}/{self._driver.count}"

    async def ask(self, command: Any) -> Any:
        self._replies[command.id] = asyncio.get_running_loop().create_future()
        self._send(command)
        return await self._replies[command.id]

    publish = activate = pin = delete = restore = ask

    def deliver(self) -> None:
        events, self._read = self._driver.events[self._read :], len(self._driver.events)
        for event in events:
            if isinstance(event, RequestFailed) and event.id in self._replies:
                self._replies.pop(event.id).set_exception(event.error)
            elif isinstance(event, PolicyReply) and event.id in self._replies:
                self._replies.pop(event.id).set_result(event)


class Durable:
    """The publisher of one engine, from its start to its end; `send` gives the engine a command."""

    def __init__(self, directory: Path, promises: Promises, send: Callable[[Any], None], keep: int) -> None:
        self._root = directory
        self._promises = promises
        self.disk = Disk()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self.disk)
        self._store = Noted(directory)
        self._face = Face(promises.driver, send)
        self._publisher = Publisher(self._face, self._store, keep)  # type: ignore[arg-type]
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unlooked = False
        self._broken: BaseException | None = None
        self._struck: set[str] = set()
        """Names that are in doubt on disk."""
        self._seen = (0, 0, 0)
        self.told: dict[str, Line] = {}
        """What the owner of each name was told."""
        self.checked: Counter[str] = Counter()

    # ---- life -------------------------------------------------------------------------------------------------------

    def restore(self, turn: Callable[[], None]) -> None:
        """As at the start of a server: `turn` takes one of the player's."""
        task = self._loop.create_task(self._publisher.restore())
        self._pump()
        while not task.done():
            turn()
        task.result()
        for name, record in self._store.records.items():
            line = self._promises.lines[name]
            agrees(record, line)
            self.told[name] = replace(line, kept=dict(line.kept), pinned=set(line.pinned))

    def end(self) -> None:
        """As when the process is killed: what is under way is neither done nor answered."""
        while tasks := asyncio.all_tasks(self._loop):
            self.disk.jobs.clear()
            for task in tasks:
                task.cancel()
            self._pump()
        self._store.close()
        self._loop.close()

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def send(self, command: Any) -> None:
        verbs: dict[type, Callable[[Any], Coroutine[Any, Any, Any]]] = {
            Publish: self._publisher.publish,
            Activate: self._publisher.activate,
            Pin: self._publisher.pin,
            Delete: self._publisher.delete,
        }
        task = self._loop.create_task(self._change(verbs[type(command)], command))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        self._pump()

    async def _change(self, verb: Callable[[Any], Coroutine[Any, Any, Any]], command: Any) -> None:
        try:
            answer = await verb(command)
        except RolloutError as error:
            answer = error
        # Changes go one at a time: what failed since the one before is of this one.
        now = (self.disk.failures, self._store.failed, len(self._promises.struck))
        failures, writes, faults = (new - old for new, old in zip(now, self._seen, strict=True))
        self._seen = now
        line = self.told.setdefault(command.name, Line())
        line.this_turn = set(line.kept)
        if isinstance(answer, RolloutError):
            mine = (StorageFailed,) * bool(failures) + (EngineFault,) * bool(faults)
            line.refused(command, answer, mine)
        else:
            line.changed(command, answer)
        # A push that was refused late has taken a number, of which nobody was told.
        engine = self._promises.lines.get(command.name)
        line.last = engine.last if engine else 0
        self.checked[f"told {type(answer).__name__}"] += 1
        self._judge(command.name, answer, writes)

    def _judge(self, name: str, answer: Any, failed_writes: int) -> None:
        """Where one write failed, the next put back what was there before; where that failed too, the name is in
        doubt until one does not."""
        if isinstance(answer, StorageFailed) and failed_writes > 1:
            self._struck.add(name)
        elif not isinstance(answer, RolloutError) or (isinstance(answer, StorageFailed) and failed_writes):
            self._struck.discard(name)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._unlooked = True
        if not task.cancelled():
            self._broken = self._broken or task.exception()

    def after_turn(self) -> None:
        """Answers what the engine did, lets the disk do one thing, and looks at everything where nothing is under
        way."""
        self._face.deliver()
        self._pump()
        if self.disk.jobs:
            self.disk.work()
            self._pump()
        if self._broken is not None:
            raise self._broken
        if self._unlooked and not self._tasks:
            self._unlooked = False
            self._check_told()
            self.check_directory()

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check_told(self) -> None:
        """The engine has what its owner was told, but for what retention let go since, which `Promises` judges."""
        for name, actual in self._promises.lines.items():
            line = self.told.setdefault(name, Line())
            assert actual.provisional is None, f"{name}@{actual.provisional} was left behind"
            assert (line.live, line.pinned) == (actual.live, actual.pinned), f"{name}: another was told of"
            assert {n: line.kept.get(n) for n in actual.kept} == actual.kept, f"{name}: other versions were told of"
            line.kept = dict(actual.kept)

    def check_directory(self) -> None:
        """What a restart would find here and now: whole names, as they were written last or perhaps since; and where
        nothing is under way and no write failed, what the engine has."""
        with tempfile.TemporaryDirectory() as place, mock.patch.object(store_module, "_sync", lambda _: None):
            copy = Path(place) / "copy"
            shutil.copytree(self._root, copy)
            with StateStore(copy) as store:
                store.adopt(self._face.info.digest)
                for name in self._store.possible.keys() | store.records.keys():
                    found = store.records.get(name)
                    possible = self._store.possible.get(name, [None])
                    assert found in possible, f"the directory says {found}, and should {possible}"
                    if found is not None:
                        assert store.load(name)[0] == found, f"{name}: weights are not there"
                    line = self._promises.lines.get(name)
                    if line is None or self.busy or name in self._struck:
                        continue
                    # Of a first push that was refused late nothing is left but a number that nobody was told.
                    agrees(found or NameRecord(name, line.last, None), line)
        if not self.busy and not self.disk.failures:
            needed = {v.digest for record in self._store.records.values() for v in record.versions}
            assert {f"sha256:{path.stem}" for path in (self._root / "bundles").iterdir()} == needed, "weights of nobody"
        self.checked["directories"] += 1

    def _pump(self) -> None:
        for _ in range(12):
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()


def agrees(record: NameRecord, line: Line) -> None:
    """A name on disk is what the engine has; only of versions that rows kept may there be more."""
    versions = {v.number: Kept(v.digest, v.mode, v.label) for v in record.versions}
    assert (record.live, record.last) == (line.live, line.last), f"{record} is not {line}"
    assert {n: versions.get(n) for n in line.kept} == line.kept, f"{record} is not {line}"
    assert {v.number for v in record.versions if v.pinned} == line.pinned, f"{record} is not {line}"
