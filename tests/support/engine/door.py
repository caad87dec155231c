"""The one door of tests into the engine: what they look at and set that no command reaches. A test that needs more gets
it here, so that a name inside the engine is known in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from adapters.resident.residency import ResidentVersions
from rollout_server.engine.batch.batch import Batch
from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.length_buckets import StepCosts
from rollout_server.engine.batch.row import Group
from rollout_server.engine.kv_cache.store import Forward
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.options import PoolingKind
from rollout_server.engine.messages.status import MemoryStatus
from rollout_server.engine.model.forward.compiled import Traces
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.scheduling.idle_memory import Memory
from rollout_server.engine.scheduling.turn_costs import Kind, ReadingCosts
from rollout_server.engine.scoring.job import ScoreJob
from rollout_server.engine.scoring.queue import ScoringQueue

FIRE = "the device is on fire"


class Door:
    engine: Engine

    # ---- what runs ------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> Batches:
        return self.engine._batches

    def batch(self, parameters: int, bucket: int | None = None) -> Batch:
        """The batch of a length bucket of a parameter set, or the first one of the set. Raises `KeyError`."""
        return self.batches[parameters] if bucket is None else self.batches._batches[parameters, bucket]

    @property
    def every_batch(self) -> list[Batch]:
        return list(self.batches._batches.values())

    @property
    def unread_of_returning(self) -> list[int]:
        """Of each batch that reads, the tokens that preempted rows of it still have to read again."""
        return [batch._recovering.unread for batch in self.every_batch if batch.reading]

    @property
    def preemptions(self) -> int:
        return self.engine._preemption.count

    @property
    def step_costs(self) -> StepCosts | None:
        return self.batches._buckets.costs

    def set_step_costs(self, costs: StepCosts | None) -> None:
        """What length buckets are chosen by, as if it had been measured."""
        self.batches._buckets.costs = costs

    @property
    def kv_limit(self) -> int:
        """Columns that all KV may come to."""
        return self.engine._memory._ledger.limit

    def set_kv_limit(self, cells: int) -> None:
        """From now on all KV is at most so many columns."""
        self.engine._memory._ledger.limit = cells

    @property
    def kv_used(self) -> int:
        """Columns that all who fill KV may come to fill soon."""
        return self.engine._memory._ledger.used()

    def set_max_rows(self, rows: int) -> None:
        self.requests._max_rows = rows

    @staticmethod
    def in_flight(batch: Batch) -> bool:
        """Whether a step was dispatched and not read yet."""
        return batch._decoder.in_flight

    @staticmethod
    def traces(batch: Batch) -> Traces:
        """Steps that batches on this batch's parameter set have compiled."""
        compiled: Any = batch._decoder._forward
        return compiled.traces

    # ---- the loop -------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.engine._busy

    @property
    def stopping(self) -> bool:
        return self.engine._stopping

    @property
    def tokens_read(self) -> int:
        """Prompt tokens and tokens that were scored, since the start."""
        return self.engine._budget.tokens

    def seconds_of_a_token(self, kind: Kind) -> float:
        """Seconds that a token of this kind is thought to cost."""
        return self.engine._budget._costs[kind].of(1)

    def learn_costs(self) -> None:
        """Measures what steps and reading cost, as at the start of a server."""
        self.batches.learn_costs()
        self.engine._budget.learn_costs()

    @property
    def reading_costs(self) -> ReadingCosts:
        return self.engine._budget._costs["prefill"]

    def take_commands(self) -> None:
        self.engine._take_commands()

    def settle(self) -> None:
        """Reads every step in flight and tells of its tokens."""
        self.batches.settle()

    def on_failed_step(self, noted: Callable[[Exception], None]) -> None:
        """`noted` sees what a step raised before its rows fail by name."""
        failures = self.engine._failures
        fail = failures.fail

        def failing(error: Exception) -> None:
            noted(error)
            fail(error)

        failures.fail = failing  # type: ignore[method-assign]

    # ---- who waits ------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> RequestQueue:
        return self.engine._requests

    @property
    def waiting_groups(self) -> list[Group]:
        return list(self.requests._waiting)

    @property
    def groups_without_version(self) -> list[Group]:
        """Those that were set aside until a version is pushed."""
        return list(self.requests._held_for_version)

    # ---- scoring --------------------------------------------------------------------------------------------------

    @property
    def scoring(self) -> ScoringQueue:
        return self.engine._scoring

    @property
    def score_jobs(self) -> list[ScoreJob]:
        return list(self.scoring._jobs)

    @property
    def reader(self) -> Any:
        return self.scoring._reader

    def read_by(self, around: Callable[[Callable[..., Any]], Callable[..., Any]], *, hidden: bool = False) -> None:
        """What is scored is computed by `around(forward)` until `read_by_itself` is called; with `hidden`, what gives
        states in the place of logits."""
        name = "_hidden" if hidden else "_forward"
        setattr(self.reader, name, around(getattr(self.reader, name)))

    def read_by_itself(self) -> None:
        self.reader._forward = self.model.forward

    @property
    def scored_rows(self) -> Any:
        """Keys and values of what is being scored."""
        return self.reader._rows

    def set_reader(self, reader: Any) -> None:
        self.scoring._reader = reader

    def set_pooling(self, how: PoolingKind) -> None:
        self.engine._tasks._pooling = how

    # ---- versions and memory --------------------------------------------------------------------------------------

    @property
    def policies(self) -> PolicyTable:
        return self.engine._policies

    @property
    def registry(self) -> Any:
        return self.policies._registry

    @property
    def resident(self) -> ResidentVersions:
        return self.policies._resident

    @property
    def residents(self) -> dict[Any, Any]:
        """What is on the device, by content."""
        return self.resident._residents

    @property
    def staging(self) -> bool:
        """True while a version is between its first and its last part."""
        return self.resident._work is not None

    @property
    def lines(self) -> dict[str, Any]:
        """The registry's line of each name."""
        found: dict[str, Any] = self.registry._lines
        return found

    @property
    def bundles_held(self) -> dict[str, int]:
        """Versions by the digest of the bundle that is kept for them."""
        counted: Counter[str] = Counter()
        for content, held in self.resident._residents.items():
            counted[held.bundle.digest] += held.references
            assert held.bundle.digest == content.digest
        return counted

    @property
    def memory(self) -> Memory:
        return self.engine._memory

    def memory_now(self) -> MemoryStatus:
        """Not as old as what the status shows."""
        return self.memory._look()

    def set_memory_clock(self, clock: Callable[[], float]) -> None:
        self.memory._clock = clock


def wrap_forwards(batch: Batch, wrap: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Every forward of the batch goes through `wrap` from now on, prefill and decode; returns what undoes it."""
    kept = batch._forward, batch._decoder._forward

    def put(prefill: Forward, decode: Forward) -> None:
        batch._forward, batch._decoder._forward = prefill, decode

    put(wrap(kept[0]), wrap(kept[1]))
    return lambda: put(*kept)


@contextmanager
def broken_steps(batch: Batch) -> Iterator[None]:
    """Every forward of the batch fails in here, prefill and decode."""

    def broken(*_: object) -> mx.array:
        raise ValueError(FIRE)

    undo = wrap_forwards(batch, lambda _: broken)
    try:
        yield
    finally:
        undo()
