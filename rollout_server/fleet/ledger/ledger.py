"""The fleet's ledger: who has which rows under which versions, and what follows when a replica is late, silent or dead.

A push has two phases. A version is staged everywhere, and then the alias moves everywhere; whoever is late with either
is fenced before the push is acknowledged: what it had not admitted goes elsewhere under a new attempt, what it says of
older attempts is not listened to, and it gets rows again once it is even with the fleet. So a group that is admitted
after an acknowledgement never runs under an older version. Rows of a dead replica are drawn again elsewhere, under the
version and the seeds that they had, which gives the same tokens.

Pure: a method is an event, `take` gives the actions that follow, and time is what the events say it is.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable

from rollout_server.fleet.ledger.placement import place
from rollout_server.fleet.ledger.records import (
    KEPT_EVEN,
    Action,
    Attempt,
    Cancel,
    Change,
    Dispatch,
    Drop,
    End,
    Flip,
    Lose,
    Phase,
    Replica,
    ReplicaState,
    Settle,
    Stage,
    Version,
    Work,
)

STAGE_S, FLIP_S = 20.0, 2.0
"""How long a replica may take to stage a version, besides the time for its bytes, and to move an alias."""
STAGE_BYTES_A_S = 20e6
GIVE_UP_S = 300.0
"""A change that no replica has made by so long after its deadline is given up, and those that still try are ended."""
SILENT_S = 10.0
"""A replica whose engine was not heard of for so long is ended."""
MOST_DEATHS = 3
"""Work that so many replicas have ended under is given up: it may be what ends them."""


class Ledger:
    """One per fleet. `silent_s`: see `SILENT_S`."""

    def __init__(self, *, silent_s: float = SILENT_S) -> None:
        self.replicas: dict[str, Replica] = {}
        self.kept: set[Version] = set()
        """Versions that every replica shall have."""
        self.live: dict[str, int] = {}
        """Where every replica's aliases shall be."""
        self.waiting: OrderedDict[Work, None] = OrderedDict()
        """Work that no replica has room for."""
        self._changes: dict[int, Change] = {}
        self._attempts: dict[int, Attempt] = {}
        self._numbers = itertools.count(1)
        self._actions: list[Action] = []
        self._silent_s = silent_s

    def take(self) -> list[Action]:
        """What follows from the events so far, in order; each is told once."""
        actions, self._actions = self._actions, []
        return actions

    def in_state(self, *states: ReplicaState) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.state in states]

    # ---- replicas ---------------------------------------------------------------------------------------------------

    def join(self, id: str, room: int, now: float) -> None:
        """A replica whose engine is ready, and has no versions."""
        replica = self.replicas[id] = Replica(id, room, heard_at=now)
        replica.state = ReplicaState.RESTORING
        self._even(replica)
        self._restored(replica)

    def heard(self, id: str, now: float) -> None:
        """Its engine's thread has answered."""
        self.replicas[id].heard_at = now

    def fence(self, *ids: str) -> None:
        """Takes replicas out before anybody is told of what they have not done."""
        for replica in (self.replicas[id] for id in ids):
            self._fence(replica)
        self._dispatch()

    def _fence(self, replica: Replica) -> None:
        if replica.state is ReplicaState.LIVE:
            replica.state = ReplicaState.FENCED
        self._take_back(replica)
        self._waits_no_longer(replica.id)

    def lost(self, id: str) -> None:
        """Its link is closed: nothing more comes from there."""
        replica = self.replicas[id]
        replica.state = ReplicaState.DEAD
        attempts = list(replica.attempts.values())
        for attempt in attempts:
            self._forget(attempt)
        self._draw_again(attempts)
        self._waits_no_longer(id)
        self._dispatch()

    def leaves(self, id: str) -> None:
        """It is about to be ended, as somebody wants it."""
        self.replicas[id].leaves = True

    def drain(self, id: str) -> None:
        """Gives it no more rows; it ends when it has none and reads nothing."""
        replica = self.replicas[id]
        replica.leaves = True
        if replica.state in KEPT_EVEN:
            replica.state = ReplicaState.DRAINING
            self._take_back(replica)
            self._dispatch()
            self._drained(replica)

    def remove(self, id: str) -> None:
        """Forgets a replica that has ended."""
        del self.replicas[id]

    def tick(self, now: float) -> None:
        """Fences who is late, ends who is silent or makes no headway."""
        silent = [replica for replica in self.in_state(*KEPT_EVEN) if now - replica.heard_at > self._silent_s]
        self.fence(*sorted(replica.id for replica in silent))
        late = [change for change in self._changes.values() if change.deadline <= now and self._done_by_any(change)]
        self.fence(*sorted(set[str]().union(*(change.waiting for change in late))))
        for replica in silent:
            self._actions.append(End(replica.id, f"its engine did not answer for {self._silent_s:g} s"))
            replica.heard_at = now
        for change in [change for change in self._changes.values() if change.deadline + GIVE_UP_S <= now]:
            self._give_up(change)

    # ---- versions ---------------------------------------------------------------------------------------------------

    def stage(self, version: Version, nbytes: int, now: float) -> int:
        """Has every replica stage a version; a `Settle` with the number that is returned says that it is there."""
        self.kept.add(version)
        return self._begin("stage", version, now, STAGE_S + nbytes / STAGE_BYTES_A_S)

    def flip(self, version: Version, now: float) -> int:
        """Has every replica move an alias; `Settle` as for `stage`. Who comes late is even before it gets rows."""
        self.kept.add(version)
        self.live[version[0]] = version[1]
        return self._begin("flip", version, now, FLIP_S)

    def drop(self, versions: Iterable[Version]) -> None:
        """Versions that nobody keeps, or that were refused: everywhere they are freed."""
        for name, number in versions:
            self.kept.discard((name, number))
            if self.live.get(name) == number:
                del self.live[name]
        for replica in self.in_state(*KEPT_EVEN):
            self._even(replica)
            self._restored(replica)
        self._settle()

    def staged(self, id: str, version: Version) -> None:
        """The replica has staged it."""
        replica = self.replicas[id]
        replica.held.add(version)
        self._done(replica)

    def flipped(self, id: str, version: Version) -> None:
        """The replica's alias is there: whatever it admits from now on uses this version or a later one."""
        replica = self.replicas[id]
        replica.live[version[0]] = version[1]
        # One that joined may still answer what it was told over an earlier link.
        replica.moves[version[0]] = max(0, replica.moves[version[0]] - 1)
        self._done(replica)

    def _begin(self, phase: Phase, version: Version, now: float, seconds: float) -> int:
        asked = {replica.id for replica in self._asked(phase)}
        change = Change(next(self._numbers), phase, version, now, seconds, asked)
        self._changes[change.number] = change
        for replica in self.in_state(*KEPT_EVEN):
            self._even(replica)
        self._settle()
        return change.number

    def _asked(self, phase: Phase) -> list[Replica]:
        """Whom a phase waits for: whoever may admit rows."""
        return self.in_state(ReplicaState.LIVE)

    def _even(self, replica: Replica) -> None:
        """Sends what it lacks, in the order in which it is to be done."""
        for version in sorted(self.kept - replica.told):
            replica.told.add(version)
            self._actions.append(Stage(replica.id, version))
        for name, number in sorted(self.live.items()):
            if replica.told_live.get(name) != number:
                replica.told_live[name] = number
                replica.moves[name] += 1
                self._actions.append(Flip(replica.id, (name, number)))
        for version in sorted(replica.told - self.kept):
            replica.told.discard(version)
            replica.held.discard(version)
            if replica.told_live.get(version[0]) == version[1]:
                del replica.told_live[version[0]]
                replica.live.pop(version[0], None)
            self._actions.append(Drop(replica.id, version))

    def is_even(self, replica: Replica) -> bool:
        """Returns whether it has said that it has all that the fleet has."""
        return self.kept <= replica.held and all(self._is_at(replica, name, at) for name, at in self.live.items())

    def _is_at(self, replica: Replica, name: str, number: int) -> bool:
        """Returns whether its alias is there, and stays."""
        return replica.live.get(name) == number and not replica.moves[name]

    def _done(self, replica: Replica) -> None:
        self._restored(replica)
        self._settle()

    def _restored(self, replica: Replica) -> None:
        waits = replica.state in (ReplicaState.RESTORING, ReplicaState.FENCED) and not replica.leaves
        if waits and self._may_serve(replica):
            replica.state = ReplicaState.LIVE
            self._dispatch()

    def _may_serve(self, replica: Replica) -> bool:
        return self.is_even(replica)

    def _waits_no_longer(self, id: str) -> None:
        for change in self._changes.values():
            change.waiting.discard(id)
        self._settle()

    def _settle(self) -> None:
        for change in list(self._changes.values()):
            change.waiting = {id for id in change.waiting if not self._has(self.replicas[id], change)}
            if not change.waiting:
                del self._changes[change.number]
                self._actions.append(Settle(change.number))

    def _done_by_any(self, change: Change) -> bool:
        """Returns whether some replica that serves has done it. Where none has, all may be busy, and nobody is late."""
        return any(self._has(replica, change) for replica in self.in_state(ReplicaState.LIVE))

    def _give_up(self, change: Change) -> None:
        """Whoever is live answers, so that it is no silent engine that it waits for."""
        (name, number), within_s = change.version, change.seconds + GIVE_UP_S
        does = "staged" if change.phase == "stage" else "moved its alias to"
        for id in sorted(change.waiting):
            drained = self.replicas[id].leaves  # Such a one is not wanted back.
            self.leaves(id)
            self._actions.append(End(id, f"it has not {does} {name}@{number} in {within_s:.0f} s", anew=not drained))
        self.fence(*sorted(change.waiting))

    def _has(self, replica: Replica, change: Change) -> bool:
        if change.phase == "stage":
            return change.version in replica.held or change.version not in self.kept
        name, number = change.version
        at = self.live.get(name)  # It may have moved on since, or be gone.
        return at is None or self._is_at(replica, name, at) or (number != at and replica.live.get(name) == number)

    # ---- readings ---------------------------------------------------------------------------------------------------

    def reads(self, id: str, reading: str) -> None:
        """A replica was asked to read something."""
        self.replicas[id].readings.add(reading)

    def has_read(self, id: str, reading: str) -> None:
        """It has answered, or is not asked for it any more."""
        if id in self.replicas:
            self.replicas[id].readings.discard(reading)
            self._drained(self.replicas[id])

    def forget_prefixes(self) -> None:
        """Replicas are told to free the KV of what they have read."""
        for replica in self.replicas.values():
            replica.prefixes.clear()

    # ---- work -------------------------------------------------------------------------------------------------------

    def submit(self, *works: Work) -> None:
        """Groups, in the order in which they are to begin."""
        self.waiting.update(dict.fromkeys(works))
        self._dispatch()

    def abort(self, work: Work) -> None:
        """Nothing more of it is wanted. What runs is told so, and reports what it has."""
        if work in self.waiting:
            del self.waiting[work]
            self._lose(work, work.missing, "aborted")
        elif work.attempt is not None:
            self._actions.append(Cancel(work.attempt.replica, work.attempt.number))

    def attempt(self, number: int) -> Attempt | None:
        """An attempt that is listened to."""
        return self._attempts.get(number)

    def admitted(self, number: int, version: Version) -> None:
        """The replica has taken the group out of its queue."""
        attempt = self.attempt(number)
        if attempt is not None:
            attempt.admitted = True
            attempt.work.admitted = attempt.work.admitted or version
            self._count(attempt, attempt.work.counted)

    def row(self, number: int, sample: int) -> bool:
        """A sample has ended; returns whether it is to be delivered: once, and from the attempt that counts."""
        attempt = self.attempt(number)
        if attempt is None or sample not in attempt.missing:
            return False
        attempt.work.missing.discard(sample)
        self._count(attempt, attempt.work.counted)
        return True

    def over(self, number: int) -> None:
        """The replica has reported all of an attempt."""
        attempt = self.attempt(number)
        if attempt is not None:
            self._forget(attempt)
            self._drained(self.replicas[attempt.replica])
            self._dispatch()

    def _count(self, attempt: Attempt, rows: int) -> None:
        self.replicas[attempt.replica].rows += rows - attempt.counted
        attempt.counted = rows

    def _forget(self, attempt: Attempt) -> None:
        self._count(attempt, 0)
        self._attempts.pop(attempt.number, None)
        self.replicas[attempt.replica].attempts.pop(attempt.number, None)
        if attempt.work.attempt is attempt:
            attempt.work.attempt = None

    def _take_back(self, replica: Replica) -> None:
        """What it has not admitted goes elsewhere. It does not count as a death."""
        back = [attempt for attempt in replica.attempts.values() if not attempt.admitted]
        for attempt in back:
            self._forget(attempt)
            self._actions.append(Cancel(replica.id, attempt.number))
        self._wait_first(attempt.work for attempt in back)

    def _draw_again(self, attempts: list[Attempt]) -> None:
        back: list[Work] = []
        for attempt in attempts:
            work = attempt.work
            work.deaths += not self.replicas[attempt.replica].leaves
            # What a switch row began on is of no use where its name has moved: it begins anew, as if it had not.
            moved = work.admitted is not None and self.live.get(work.name) not in (None, work.admitted[1])
            if work.switches and moved:
                work.admitted = None
            again = set() if work.admitted is None else {work.admitted[1]}
            gone_over = {sample for sample in work.missing if work.shown.get(sample, again) != again}
            if work.deaths >= MOST_DEATHS or not work.missing:
                self._lose(work, work.missing, f"{work.deaths} replicas ended while they computed this row")
            elif gone_over:
                self._lose(
                    work, gone_over, "its replica ended after its name had moved on, and tokens of it were handed on"
                )
            if work.missing:
                back.append(work)
        self._wait_first(back)

    def _wait_first(self, works: Iterable[Work]) -> None:
        """They came before all that waits."""
        for work in reversed(list(works)):
            self.waiting[work] = None
            self.waiting.move_to_end(work, last=False)

    def _lose(self, work: Work, samples: set[int], reason: str) -> None:
        self._actions.append(Lose(work, tuple(sorted(samples)), reason))
        work.missing = work.missing - samples

    def _dispatch(self) -> None:
        """First come, first served: what does not fit yet lets nothing pass."""
        live = self.in_state(ReplicaState.LIVE)
        while self.waiting:
            work = next(iter(self.waiting))
            if (replica := place(work, self._meant(work), live)) is None:
                return
            del self.waiting[work]
            attempt = Attempt(
                next(self._numbers), replica.id, work, tuple(sorted(work.missing)), pinned=self._pin(work)
            )
            work.attempt = self._attempts[attempt.number] = replica.attempts[attempt.number] = attempt
            self._count(attempt, work.counted)
            self._actions.append(Dispatch(attempt))

    def _meant(self, work: Work) -> Version:
        """What it would begin on now."""
        number = work.number if work.number is not None else self.live.get(work.name, 0)
        return work.admitted or (work.name, number)

    def _pin(self, work: Work) -> Version | None:
        return work.admitted

    def _drained(self, replica: Replica) -> None:
        if replica.state is ReplicaState.DRAINING and not replica.attempts and not replica.readings:
            self._actions.append(End(replica.id, "it was drained", drained=True))
