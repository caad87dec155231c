"""Who is behind a controller, wherever each replica runs: what was heard of it last, and what it is told.

Where replicas come from is a `Source`: processes of this machine (`children`), those that are placed elsewhere, or
those that join. A source opens connections and hands each to `Roster.serve`; one that starts its replicas itself has
`Roster.keep` open them again and again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from rollout_server.engine.messages.control import Pause, Stop
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.rollouts import Event
from rollout_server.engine.messages.status import (
    EngineStatus,
    MemoryStatus,
    PictureStatus,
    PrefixStatus,
    ReplicaStatus,
    TokenGaps,
)
from rollout_server.engine.messages.versions import PolicyStatus
from rollout_server.errors import EngineFault, EngineUnavailable, RolloutError
from rollout_server.fleet.codec.frames import BadFrame
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import ReplicaState
from rollout_server.fleet.wire import CannotStart, Dismissed, Ready, Refused

log = logging.getLogger("rollout_server.fleet")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a replica that ended is started again; each start that comes to nothing doubles it."""
STOP_S = 10.0
"""Seconds that a replica may take to end its step and go."""


class Controller(Protocol):
    """Who is told of replicas."""

    async def joined(self, id: str, ready: Ready) -> ModelInfo:
        """It has loaded its model. Raises `RolloutError` where it is not taken."""

    def left(self, id: str) -> bool:
        """Its connection is closed; returns whether it had become live."""

    def heard(self, id: str, message: Event) -> None: ...

    def fail(self, error: RolloutError) -> None:
        """A replica could not be had, which matters before any other is there."""

    def give_up(self, error: RolloutError) -> None:
        """None can be had any more, nor those kept that are there."""


class Connection(Protocol):
    """A way to one replica that runs; `Link` is one. `pid` is its process's, where that is of this machine."""

    @property
    def pid(self) -> int | None: ...

    def send(self, message: Any) -> None: ...

    async def receive(self) -> Any:
        """The next message; None once the connection is closed. Raises `BadFrame`."""

    def kill(self) -> None:
        """Ends the replica, or this way to it, at once."""

    async def ended(self, within_s: float) -> None:
        """Waits until the replica has gone, ends it where it does not, and closes the connection."""


class Source(Protocol):
    """Where replicas come from."""

    def start(self, roster: Roster) -> None:
        """Begins on the running event loop."""

    async def stop(self) -> None:
        """Starts and takes no more; returns when all connections it has opened have ended."""


@dataclass(slots=True)
class Member:
    """One replica, whether it runs or not."""

    id: str
    link: Connection | None = None
    info: ModelInfo | None = None
    status: EngineStatus | None = None
    restarts: int = 0
    leaving: bool = False
    served: bool = False
    """It was there before."""
    renewing: bool = False
    """It ends to be started anew."""
    kept: bool = False
    """It is started here, again and again; one that joins comes by itself."""


class Roster:
    """Belongs to the event loop."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._members: dict[str, Member] = {}
        self._stopping = asyncio.Event()
        self._gone = EngineStatus("dead")
        """Counts of replicas that have ended."""
        self._last_words: dict[str, Dismissed] = {}
        """To those that were let go, until somebody asks."""

    def send(self, id: str, message: Any) -> None:
        member = self._members.get(id)
        if member is not None and member.link is not None:
            member.link.send(message)

    def end(self, id: str, reason: str, refusal: RolloutError | None = None) -> None:
        """Ends a replica at once. One that joined and is told a `refusal` does not come back as it is."""
        member = self._members.get(id)
        log.warning("Replica %s is ended: %s.", id, reason)
        if member is not None and member.link is not None:
            if refusal is not None:
                member.link.send(Refused(refusal))
            elif member.leaving or member.renewing:
                # One that joined would come back, as it was.
                member.link.send(Dismissed(reason, again=member.renewing))
            member.link.kill()

    def leave(self, id: str, *, again: bool) -> bool:
        """It is not started again, or with `again` it is and loads its model anew; returns whether it is there."""
        member = self._members.get(id)
        if member is None or (again and member.link is None and not member.kept):
            return False
        member.leaving, member.renewing = not again, again
        if member.leaving and member.link is None:
            del self._members[id]
        return True

    def last_word(self, id: str) -> Dismissed | None:
        """What a replica was to be told whose link has ended since it was let go."""
        return self._last_words.pop(id, None)

    def forget(self, id: str) -> None:
        """One that does not come back is not listed any more."""
        member = self._members.get(id)
        if member is not None and member.link is None:
            del self._members[id]

    def refuse(self, error: RolloutError) -> None:
        """No replica can be had."""
        log.error("No replica can be had: %s", error)
        self._controller.fail(error)

    def give_up(self, error: RolloutError) -> None:
        """Where replicas come from is gone, with those that are there."""
        log.critical("%s", error)
        self._controller.give_up(error)

    def kill(self) -> None:
        self._stopping.set()
        for member in self._members.values():
            if member.link is not None:
                member.link.kill()

    async def stop(self, source: Source) -> None:
        """Has all replicas end and tell what they still have to say."""
        self._stopping.set()
        for id in self._members:
            self.send(id, Stop())
        stopped = asyncio.create_task(source.stop())
        _, late = await asyncio.wait([stopped], timeout=STOP_S)
        if late:
            self.kill()
        await stopped

    # ---- what is known of them --------------------------------------------------------------------------------------

    def statuses(self) -> list[EngineStatus]:
        """What those that run said last, and the counts of those that have ended."""
        return [self._gone, *(member.status for member in self._members.values() if member.status is not None)]

    def told(self, ledger: Ledger, now: float) -> tuple[ReplicaStatus, ...]:
        return tuple(self._told(member, ledger, now) for member in self._members.values())

    def _told(self, member: Member, ledger: Ledger, now: float) -> ReplicaStatus:
        known = ledger.replicas.get(member.id)
        state = known.state if known else ReplicaState.JOINING if member.link is not None else ReplicaState.DEAD
        return ReplicaStatus(
            member.id,
            str(state),
            member.info.device if member.info else None,
            member.link.pid if member.link else None,
            known.rows if known else 0,
            len(known.held) if known else 0,
            max(0.0, now - known.heard_at) if known else 0.0,
            member.status.running if member.status else 0,
            member.status.tokens if member.status else 0,
            member.restarts,
            frozenset(known.held) if known else frozenset(),
        )

    # ---- one of them ------------------------------------------------------------------------------------------------

    async def keep(self, id: str, open: Callable[[], Awaitable[Connection]], first: Any) -> None:
        """Runs a replica again and again: `open` starts it, and `first` is what it is told first."""
        pause = FIRST_PAUSE_S
        self._members[id] = Member(id, kept=True)
        while not self._stopping.is_set() and (member := self._members.get(id)) is not None:
            # Whatever it is: nobody else would see it, and the replica would never be started again.
            (ended,) = await asyncio.gather(self._opened(id, open, first), return_exceptions=True)
            was_live = ended is True
            match ended:
                case RolloutError():
                    log.error("Replica %s could not start: %s", id, ended)
                    self._controller.fail(ended)
                case OSError():
                    # No process, file or memory is left for one just now.
                    log.error("Replica %s could not be started: %s", id, ended)
                    self._controller.fail(EngineUnavailable(f"Replica {id} could not be started: {ended}."))
                case Exception():
                    log.error("Replica %s could not be served.", id, exc_info=ended)
                    self._controller.fail(EngineFault(f"Replica {id} could not be served: {ended!r}."))
                case BaseException():
                    raise ended
            pause = FIRST_PAUSE_S if was_live else min(2 * pause, LONGEST_PAUSE_S)
            if self._stopping.is_set() or member.leaving or self._members.get(id) is not member:
                break
            log.warning("Replica %s has ended; it is started again in %g s.", id, pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _opened(self, id: str, open: Callable[[], Awaitable[Connection]], first: Any) -> bool:
        """Returns whether it had become live."""
        member = self._members.get(id)
        link = await open()
        if self._members.get(id) is not member:
            # It was removed while it was waited for.
            link.kill()
            await link.ended(1.0)
            return False
        return await self.serve(id, link, first)

    async def serve(self, id: str, link: Connection, first: Any) -> bool:
        """Listens to a replica until its connection closes; returns whether it had become live. Raises what kept it
        from being taken."""
        member = self._members.setdefault(id, Member(id))
        member.restarts += member.served
        member.link, member.served, member.renewing = link, True, False
        was_live = False
        try:
            link.send(first)
            match told := await link.receive():
                case Ready():
                    member.info = await self._controller.joined(id, told)
                case CannotStart(error=error):
                    raise error
                case _:
                    raise EngineUnavailable("its process ended before the model was loaded; its log says why")
            while (message := await link.receive()) is not None:
                if isinstance(message, EngineStatus):
                    member.status = message
                else:
                    self._controller.heard(id, message)
        except BadFrame as error:
            log.error("Replica %s said what nobody understands: %s", id, error)
            link.kill()
        except RolloutError as error:
            link.send(Refused(error))
            raise
        finally:
            member.link = None
            was_live = self._controller.left(id)
            self._count(member)
            if member.leaving:
                self._members.pop(id, None)
            if not member.kept and (member.leaving or member.renewing):
                self._last_words[id] = Dismissed("it was let go", again=member.renewing)
            await link.ended(STOP_S if self._stopping.is_set() else 1.0)
        return was_live

    def _count(self, member: Member) -> None:
        """Counts go on over restarts."""
        last, gone = member.status, self._gone
        if last is not None:
            self._gone = replace(
                gone,
                steps=gone.steps + last.steps,
                tokens=gone.tokens + last.tokens,
                gaps=gone.gaps + last.gaps,
                preemptions=gone.preemptions + last.preemptions,
                memory=MemoryStatus(),
            )
        member.status = None


def fleet_status(
    state: str,
    fault: str | None,
    waiting: int,
    unplaced: int,
    policies: tuple[PolicyStatus, ...],
    paused: Pause | None,
    replicas: tuple[ReplicaStatus, ...],
    fewest: int,
    statuses: Sequence[EngineStatus],
) -> EngineStatus:
    """One status of many engines: sums of what replicas said last; counts are of those that run and of those that have
    ended. `unplaced` are the samples that no replica has room for."""

    def total(name: str) -> int:
        return sum(getattr(status, name) for status in statuses)

    prefixes = [status.prefix for status in statuses]
    memory = {part.name: sum(getattr(s.memory, part.name) for s in statuses) for part in fields(MemoryStatus)}
    return EngineStatus(
        state=state,
        fault=fault,
        waiting=waiting,
        waiting_rows=unplaced + total("waiting_rows"),
        running=total("running"),
        preempted=total("preempted"),
        preemptions=total("preemptions"),
        policies=policies,
        steps=total("steps"),
        tokens=total("tokens"),
        gaps=sum((status.gaps for status in statuses), TokenGaps()),
        slot_bytes=total("slot_bytes"),
        set_bytes=total("set_bytes"),
        sets=total("sets"),
        prefix=PrefixStatus(
            any(prefix.on for prefix in prefixes),
            **{
                part.name: sum(getattr(prefix, part.name) for prefix in prefixes)
                for part in fields(PrefixStatus)
                if part.name != "on"
            },
        ),
        paused=paused.mode if paused else None,
        memory=MemoryStatus(**memory),
        pictures=PictureStatus(
            **{part.name: sum(getattr(s.pictures, part.name) for s in statuses) for part in fields(PictureStatus)}
        ),
        replicas=replicas,
        fewest=fewest,
    )
