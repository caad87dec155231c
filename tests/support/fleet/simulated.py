"""A fleet without processes: the real ledger, replicas of a few lines, links that are slow or cut, and a clock that
jumps from event to event.

    python -m tests.support.fleet.simulated --replicas 64 --groups 10000
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import (
    Attempt,
    Cancel,
    Dispatch,
    Drop,
    End,
    Flip,
    Lose,
    Settle,
    Stage,
    Version,
    Work,
)

NAME, ROOM, KEEP = "trained", 16, 3
TICK_S, PING_S, CLOSED_S, RESTART_S = 0.25, 1.0, 0.05, 3.0
LONGEST_S = 3600.0
"""A run that is not over by then has left somebody waiting."""


@dataclass(eq=False)
class Engine:
    """What a replica does, as far as the ledger can see. It dies with its `generation`."""

    id: str
    generation: int
    alias: int = 0
    kept: set[int] = field(default_factory=set)
    queue: deque[Attempt] = field(default_factory=deque)
    running: dict[int, tuple[Attempt, int, float]] = field(default_factory=dict)
    """Version and time of admission, by attempt."""
    busy_until: float = 0.0
    """Commands are done one after another."""
    cut_until: float = 0.0
    sent_until: float = 0.0
    heard_until: float = 0.0


@dataclass
class Outcome:
    groups: int = 0
    stale: int = 0
    mixed: int = 0
    """Groups with samples of more than one version."""
    twice: int = 0
    unanswered: int = 0
    lost: int = 0
    redrawn: int = 0
    """Samples that came from another attempt than the first."""
    pushes: list[float] = field(default_factory=list)
    """Seconds that each took."""


class Fleet:
    """`die` and `cut` are rates of each replica, a second, until all groups were sent."""

    def __init__(
        self, make: Callable[[], Ledger], replicas: int, groups: int, seed: int, *, die: float = 0.01, cut: float = 0.01
    ) -> None:
        self.random = random.Random(seed)
        self.ledger, self.now, self.outcome = make(), 0.0, Outcome()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count, self._generations = itertools.count(), itertools.count()
        self._engines: dict[str, Engine] = {}
        self._acknowledged = [(0.0, 0)]
        self._works: list[Work] = []
        self._delivered: dict[tuple[int, int], int] = {}
        self._began: dict[Work, float] = {}
        """When each group was first admitted, by an attempt that was listened to."""
        self._settling: dict[int, Callable[[], None]] = {}
        self._answered, self._to_send, self._version = 0, groups, 0
        self._rate, self._die, self._cut = 40.0 * replicas / 8, die, cut
        for index in range(replicas):
            self._start(f"r{index}")
        self._at(0.0, self._submit)
        self._at(0.5, self._push)
        self._at(TICK_S, self._tick)

    def run(self) -> Outcome:
        while self._heap and self.now < LONGEST_S and not self._over:
            self.now, _, event = heapq.heappop(self._heap)
            event()
            self._act()
        self.outcome.unanswered = sum(bool(work.missing) for work in self._works)
        versions: dict[int, set[int]] = {}
        for (work, _), version in self._delivered.items():
            versions.setdefault(work, set()).add(version)
        self.outcome.mixed = sum(len(of) > 1 for of in versions.values())
        return self.outcome

    @property
    def _over(self) -> bool:
        while self._answered < len(self._works) and not self._works[self._answered].missing:
            self._answered += 1
        return not self._to_send and self._answered == len(self._works)

    def _at(self, seconds: float, event: Callable[[], None]) -> None:
        self._when(self.now + seconds, event)

    def _when(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (moment, next(self._count), event))

    # ---- the world --------------------------------------------------------------------------------------------------

    def _start(self, id: str) -> None:
        engine = self._engines[id] = Engine(id, next(self._generations))
        self.ledger.join(id, ROOM, self.now)
        self._alive(engine, PING_S, lambda: self._ping(engine))
        if self._die:
            self._alive(engine, self.random.expovariate(self._die), lambda: self._crash(engine))
        if self._cut:
            self._alive(engine, self.random.expovariate(self._cut), lambda: self._sever(engine))

    def _alive(self, engine: Engine, seconds: float, event: Callable[[], None]) -> None:
        self._still(engine, self.now + seconds, event)

    def _still(self, engine: Engine, moment: float, event: Callable[[], None]) -> None:
        self._when(moment, lambda: event() if self._engines.get(engine.id) is engine else None)

    def _ping(self, engine: Engine) -> None:
        self._tell(engine, lambda: self.ledger.heard(engine.id, self.now))
        self._alive(engine, PING_S, lambda: self._ping(engine))

    def _crash(self, engine: Engine) -> None:
        if self._to_send:
            self._end(engine)

    def _end(self, engine: Engine) -> None:
        del self._engines[engine.id]

        def closed() -> None:
            self.ledger.lost(engine.id)
            self.ledger.remove(engine.id)
            self._at(RESTART_S, lambda: self._start(engine.id))

        self._at(CLOSED_S, closed)

    def _sever(self, engine: Engine) -> None:
        """Nothing passes for a while, in either direction, and nothing is lost; one time in ten it is for ever."""
        if not self._to_send:
            return
        engine.cut_until = self.now + (self.random.uniform(0.5, 6.0) if self.random.random() < 0.9 else 1e9)
        self._alive(engine, self.random.expovariate(self._cut), lambda: self._sever(engine))

    def _tell(self, engine: Engine, event: Callable[[], None]) -> None:
        """A message to the controller: in order, and never from a replica that is gone for it."""
        engine.sent_until = max(engine.sent_until, self.now + self.random.uniform(0.0005, 0.01), engine.cut_until)
        self._still(engine, engine.sent_until, event)

    def _send(self, id: str, event: Callable[[Engine], None]) -> None:
        engine = self._engines.get(id)
        if engine is not None:
            engine.heard_until = max(engine.heard_until, self.now + self.random.uniform(0.0005, 0.01), engine.cut_until)
            self._still(engine, engine.heard_until, lambda: event(engine))

    def _command(self, engine: Engine, seconds: float, event: Callable[[], None]) -> None:
        engine.busy_until = max(engine.busy_until, self.now) + seconds
        self._still(engine, engine.busy_until, event)

    # ---- the controller ---------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.ledger.tick(self.now)
        self._at(TICK_S, self._tick)

    def _submit(self) -> None:
        if not self._to_send:
            return
        self._to_send -= 1
        prompt = tuple(self.random.randrange(50) for _ in range(40))
        self._works.append(Work(len(self._works), NAME, prompt, self.random.choice((1, 2, 4))))
        self.outcome.groups += 1
        self.ledger.submit(self._works[-1])
        self._at(self.random.expovariate(self._rate), self._submit)

    def _push(self) -> None:
        began, number = self.now, self._version + 1
        self._version = number

        def staged() -> None:
            self._settling[self.ledger.flip((NAME, number), self.now)] = flipped

        def flipped() -> None:
            self._acknowledged.append((self.now, number))
            self.outcome.pushes.append(self.now - began)
            used = {work.admitted for work in self._works[-5000:] if work.missing}
            self.ledger.drop(v for v in list(self.ledger.kept) if v[1] <= number - KEEP and v not in used)
            self._at(self.random.uniform(0.2, 2.0), self._push)

        self._settling[self.ledger.stage((NAME, number), 20_000_000, self.now)] = staged

    def _act(self) -> None:
        while actions := self.ledger.take():
            for action in actions:
                match action:
                    case Dispatch(attempt):
                        self._send(attempt.replica, lambda engine, attempt=attempt: self._queue(engine, attempt))  # type: ignore[misc]
                    case Cancel(replica, number):
                        self._send(replica, lambda engine, number=number: self._cancel(engine, number))  # type: ignore[misc]
                    case Stage(replica, version):
                        self._send(replica, lambda engine, version=version: self._stage(engine, version))  # type: ignore[misc]
                    case Flip(replica, version):
                        self._send(replica, lambda engine, version=version: self._flip(engine, version))  # type: ignore[misc]
                    case Drop(replica, (_, number)):
                        self._send(replica, lambda engine, number=number: engine.kept.discard(number))  # type: ignore[misc]
                    case End(replica):
                        if engine := self._engines.get(replica):
                            self._end(engine)
                    case Lose(_, samples):
                        self.outcome.lost += bool(samples)
                    case Settle(change):
                        self._settling.pop(change)()

    # ---- a replica --------------------------------------------------------------------------------------------------

    def _stage(self, engine: Engine, version: Version) -> None:
        seconds = 30.0 if self.random.random() < 0.002 else self.random.uniform(0.01, 0.3)

        def staged() -> None:
            engine.kept.add(version[1])
            self._tell(engine, lambda: self.ledger.staged(engine.id, version))

        self._command(engine, seconds, staged)

    def _flip(self, engine: Engine, version: Version) -> None:
        def flipped() -> None:
            engine.alias = version[1]
            self._tell(engine, lambda: self.ledger.flipped(engine.id, version))

        self._command(engine, 0.001, flipped)

    def _queue(self, engine: Engine, attempt: Attempt) -> None:
        engine.queue.append(attempt)
        self._admit(engine)

    def _cancel(self, engine: Engine, number: int) -> None:
        engine.queue = deque(attempt for attempt in engine.queue if attempt.number != number)
        engine.running.pop(number, None)
        self._admit(engine)

    def _admit(self, engine: Engine) -> None:
        while engine.queue and len(engine.running) < ROOM // 2:
            attempt = engine.queue.popleft()
            version = attempt.pinned[1] if attempt.pinned else engine.alias
            engine.running[attempt.number] = (attempt, version, self.now)
            self._tell(engine, lambda a=attempt, v=version, at=self.now: self._admitted(a, v, at))  # type: ignore[misc]
            last = 0.0
            for sample in attempt.samples:
                seconds = self.random.expovariate(1 / 0.4)
                last = max(last, seconds)
                self._alive(engine, seconds, lambda a=attempt, s=sample: self._finish(engine, a, s))  # type: ignore[misc]
            self._alive(engine, last + 1e-6, lambda a=attempt: self._over_with(engine, a))  # type: ignore[misc]

    def _admitted(self, attempt: Attempt, version: int, at: float) -> None:
        if self.ledger.attempt(attempt.number) is not None:
            self._began.setdefault(attempt.work, at)
        self.ledger.admitted(attempt.number, (NAME, version))

    def _finish(self, engine: Engine, attempt: Attempt, sample: int) -> None:
        if attempt.number not in engine.running:
            return
        _, version, admitted_at = engine.running[attempt.number]
        self._tell(engine, lambda: self._row(attempt, sample, version, admitted_at))

    def _over_with(self, engine: Engine, attempt: Attempt) -> None:
        if engine.running.pop(attempt.number, None) is not None:
            self._tell(engine, lambda: self.ledger.over(attempt.number))
            self._admit(engine)

    def _row(self, attempt: Attempt, sample: int, version: int, admitted_at: float) -> None:
        if not self.ledger.row(attempt.number, sample):
            return
        key = (int(str(attempt.work.key)), sample)
        self.outcome.twice += key in self._delivered
        self._delivered[key] = version
        self.outcome.redrawn += attempt.pinned is not None
        # What is drawn again was admitted before, and keeps the version that it had then.
        began = admitted_at if attempt.pinned is None else self._began[attempt.work]
        self.outcome.stale += version < max(number for at, number in self._acknowledged if at <= began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    outcome = Fleet(Ledger, given.replicas, given.groups, given.seed).run()
    took = sorted(outcome.pushes)
    middle, most = took[len(took) // 2], took[int(len(took) * 0.95)]
    sys.stdout.write(
        f"{outcome.groups} groups, {outcome.stale} stale, {outcome.mixed} mixed, {outcome.unanswered} unanswered, "
        f"{outcome.twice} twice, {outcome.lost} given up, {outcome.redrawn} samples drawn again, "
        f"{len(took)} pushes of {middle:.2f} s (p95 {most:.2f} s)\n"
    )


if __name__ == "__main__":
    main()
