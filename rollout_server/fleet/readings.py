"""What is asked of a fleet besides rows: readings, which one replica answers, and orders, which all carry out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rollout_server.engine.messages.control import (
    Abort,
    LookAtRows,
    Pause,
    Paused,
    PrefixCacheReset,
    Release,
    Released,
    ResetPrefixCache,
    Resume,
    RowSeen,
    RowsSeen,
)
from rollout_server.engine.messages.rollouts import Event, RequestFailed
from rollout_server.engine.messages.scoring import (
    Classified,
    Classify,
    Embedded,
    HoldScorer,
    LetScorerGo,
    Scored,
    ScorerHeld,
    ScoringCommand,
)
from rollout_server.errors import EngineUnavailable, ReplicaLost, RolloutError
from rollout_server.fleet.ledger.ledger import MOST_DEATHS, Ledger
from rollout_server.fleet.ledger.records import ReplicaState
from rollout_server.fleet.versions import FleetVersions
from rollout_server.rollout import PolicyVersion

Order = Pause | Resume | Release | ResetPrefixCache | LookAtRows


@dataclass(slots=True)
class _Reading:
    command: ScoringCommand | HoldScorer
    replica: str | None = None
    deaths: int = 0


@dataclass(slots=True)
class _Held:
    """A version that is kept for the rows of a call."""

    command: HoldScorer
    replicas: set[str]
    """Those that were asked to keep it: what one of them reads may still wait there when rows go elsewhere."""
    kept: PolicyVersion | None = None
    """What the controller's registry keeps for it."""


@dataclass(slots=True)
class _Ordered:
    order: Order
    waiting: set[str]
    events: list[Event] = field(default_factory=list)


class FleetReadings:
    """Belongs to the event loop; `post` and `send` as in `FleetRequests`, `seen` is its `seen`."""

    def __init__(
        self,
        ledger: Ledger,
        versions: FleetVersions,
        post: Callable[[list[Event]], None],
        send: Callable[[str, Any], None],
        seen: Callable[[RowSeen], RowSeen | None],
    ) -> None:
        self._ledger = ledger
        self._seen = seen
        self._versions = versions
        self._post = post
        self._send = send
        self._readings: dict[str, _Reading] = {}
        self._held: dict[str, _Held] = {}
        self._orders: dict[str, _Ordered] = {}
        self.paused: Pause | None = None

    # ---- readings ---------------------------------------------------------------------------------------------------

    def read(self, command: ScoringCommand | HoldScorer) -> None:
        """Has one replica answer, the one with the fewest readings; waits until one is live."""
        reading = self._readings[command.id] = _Reading(command)
        try:
            if isinstance(command, HoldScorer):
                # Whatever the name comes to mean, the same version is held again where this replica ends.
                reading.command = replace(command, policy=self._versions.pinned(command.policy), elsewhere=True)
        except RolloutError as error:
            del self._readings[command.id]
            self._post([RequestFailed(command.id, error)])
            return
        self._place(reading)

    def place_waiting(self) -> None:
        """A replica has become live."""
        for reading in list(self._readings.values()):
            if reading.replica is None:
                self._place(reading)

    def _place(self, reading: _Reading) -> None:
        live = self._ledger.in_state(ReplicaState.LIVE)
        if not live:
            return
        command = reading.command
        held = self._held.get(command.held) if isinstance(command, Classify) else None
        busy = [other.replica for other in self._readings.values()]
        keeps = [replica for replica in live if held is not None and replica.id in held.replicas]
        chosen = min(keeps or live, key=lambda replica: (busy.count(replica.id), replica.rows)).id
        if held is not None and chosen not in held.replicas:
            held.replicas.add(chosen)
            self._send(chosen, held.command)
        if isinstance(command, HoldScorer):
            self._held[command.id] = _Held(command, {chosen})
        reading.replica = chosen
        self._ledger.reads(chosen, command.id)
        self._send(chosen, command)

    def let_go(self, command: LetScorerGo) -> None:
        """Nobody waits for its answer any more, if it has none yet."""
        self._forget(command.id)
        held = self._held.pop(command.id, None)
        if held is not None:
            for replica in sorted(held.replicas):
                self._send(replica, command)
            if held.kept is not None:
                self._versions.let_go(held.kept, 1)

    def abort(self, id: str, reason: str) -> None:
        """Ends a reading, or all readings for a request. It is answered here: a replica's last word on it is not told
        from that of an engine that ends."""
        for reading in [each for each in self._readings.values() if self._is_for(each.command, id)]:
            ended = reading.command.id
            self._forget(ended)
            if reading.replica is not None:
                self._send(reading.replica, Abort((ended,), reason))
            self._post(
                [RequestFailed(ended, EngineUnavailable(f"The request was ended ({reason}) before it was read."))]
            )

    def _forget(self, id: str) -> None:
        """It is answered, or nobody waits for it."""
        reading = self._readings.pop(id, None)
        if reading is not None and reading.replica is not None:
            self._ledger.has_read(reading.replica, id)

    def _is_for(self, command: ScoringCommand | HoldScorer, id: str) -> bool:
        held = self._held.get(command.held) if isinstance(command, Classify) and command.held is not None else None
        return command.id == id or (held is not None and held.command.owner == id)

    def answered(self, replica: str, event: Event) -> bool:
        """A replica's answer; returns whether it was one to a reading or an order."""
        if event.id in self._orders:
            self._ordered(replica, event)
            return True
        reading = self._readings.get(event.id)
        if reading is None or reading.replica != replica:
            return event.id in self._held
        self._forget(event.id)
        held = self._held.get(event.id)
        if held is not None and isinstance(event, ScorerHeld):
            held.kept = event.version if self._versions.hold(event.version, 1) else None
        elif held is not None:
            del self._held[event.id]
        self._post([self._labelled(event)])
        return True

    def _labelled(self, event: Event) -> Event:
        """With the labels that versions have now."""
        match event:
            case Scored(version=version, sequences=sequences):
                read = tuple(replace(each, spans=self._versions.spans_labelled(each.spans)) for each in sequences)
                return replace(event, version=self._versions.labelled(version), sequences=read)
            case Embedded(version=version) | Classified(version=version) | ScorerHeld(version=version):
                return replace(event, version=self._versions.labelled(version))
        return event

    # ---- orders -----------------------------------------------------------------------------------------------------

    def order(self, order: Order) -> None:
        """Has every replica do it; answered when all live ones have."""
        if isinstance(order, Pause):
            self.paused = order
        elif isinstance(order, Resume):
            self.paused = None
        elif isinstance(order, ResetPrefixCache | Release):
            self._ledger.forget_prefixes()
        live = {replica.id for replica in self._ledger.in_state(ReplicaState.LIVE)}
        for replica in self._ledger.replicas:
            self._send(replica, order)
        self._orders[order.id] = _Ordered(order, live)
        self._carried_out(order.id)

    def _ordered(self, replica: str, event: Event) -> None:
        ordered = self._orders[event.id]
        if replica in ordered.waiting:
            ordered.events.append(event)
            ordered.waiting.discard(replica)
            self._carried_out(event.id)

    def _carried_out(self, id: str) -> None:
        ordered = self._orders[id]
        if ordered.waiting:
            return
        del self._orders[id]
        match ordered.order:
            case Pause(mode=mode):
                self._post([Paused(id, mode)])
            case Resume():
                self._post([Paused(id, None)])
            case Release():
                told = [event for event in ordered.events if isinstance(event, Released)]
                self._post([Released(id, sum(t.nbytes for t in told), sum(t.kv_bytes for t in told))])
            case ResetPrefixCache():
                freed = sum(event.freed_bytes for event in ordered.events if isinstance(event, PrefixCacheReset))
                self._post([PrefixCacheReset(id, freed)])
            case LookAtRows():
                seen = [event for event in ordered.events if isinstance(event, RowsSeen)]
                rows = tuple(own for each in seen for row in each.rows if (own := self._seen(row)) is not None)
                by_version = Counter[PolicyVersion]()
                for each in seen:
                    by_version.update(dict(each.by_version))
                self._post([RowsSeen(id, rows, sum(each.count for each in seen), tuple(by_version.items()))])

    # ---- replicas ---------------------------------------------------------------------------------------------------

    def lost(self, replica: str) -> None:
        """What it was asked goes to another one, unless replicas keep ending over it: one that was told to go does not
        count."""
        died = not self._ledger.replicas[replica].leaves
        for id, ordered in list(self._orders.items()):
            ordered.waiting.discard(replica)
            self._carried_out(id)
        for held in self._held.values():
            # One that is started again under this id keeps nothing.
            held.replicas.discard(replica)
        for id, reading in list(self._readings.items()):
            if reading.replica != replica:
                continue
            reading.replica, reading.deaths = None, reading.deaths + died
            if reading.deaths >= MOST_DEATHS:
                del self._readings[id]
                self._held.pop(id, None)
                self._post([RequestFailed(id, ReplicaLost(f"{reading.deaths} replicas ended while they read this."))])
            else:
                self._place(reading)
