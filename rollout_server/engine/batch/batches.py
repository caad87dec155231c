"""Batches behind the face of one. Each parameter set that rows run on has its own, since a forward reads one set of
weights; where rows of one set differ much in length it has one for each length bucket, see `length_buckets`.

A batch is made when the first group needs it. One without rows keeps its KV for the next rows of its set until another
batch needs room or its set is gone. Batches compute one after another, and each is told of before the next one
computes: where a batch fails, the rows of those before it are known to have gone on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from adapters.placement import BASE_SET
from rollout_server.engine.batch.batch import Batch
from rollout_server.engine.batch.joining import FIRST, Admission, BatchKey, Joining, KVUser, RowSink, age_of
from rollout_server.engine.batch.length_buckets import MEASURED_CELLS, MEASURED_WIDTH, LengthBuckets, Shape, StepCosts
from rollout_server.engine.batch.recompute import RecomputeRun, Recovery
from rollout_server.engine.batch.row import Row
from rollout_server.engine.blame import Blame
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.kv_cache.store import KVStore

ARRANGED_EVERY = 16
"""Turns."""


class Batches:
    """`make(parameters)` gives an empty batch whose forwards run on that parameter set, `store` is of the kind that
    batches have, never filled, and says what rows take where there is no batch yet. `ledger` is told before rows come
    to fill more, `sink` what became of them, `blame` what is being computed. `measure(width)` says what steps cost;
    None where rows cannot be put into buckets."""

    def __init__(
        self,
        make: Callable[[int], Batch],
        store: KVStore,
        ledger: KVLedger,
        sink: RowSink,
        blame: Blame,
        measure: Callable[[int], StepCosts] | None = None,
    ) -> None:
        self._make = make
        self._store = store
        self._sink = sink
        self._blame = blame
        self._ledger = ledger
        ledger.register("rows", lambda: self.held_cells, after_step=lambda: self.cells_after_step + self.idle_cells)
        self._measure = measure
        self._buckets = LengthBuckets(store.places)
        self._batches: dict[BatchKey, Batch] = {FIRST: make(BASE_SET)}
        self._steps_before = self._prefilled_before = 0
        self._turns = 0
        self._read_last = FIRST
        self.preempted: list[Row] = []
        """Rows whose KV was dropped and that wait to come back, oldest first."""

    def __getitem__(self, parameters: int) -> Batch:
        """The first batch of a set. Raises `KeyError` where no row has run on this set lately."""
        return self._batches[self._of(parameters)[0]] if self._of(parameters) else self._batches[BatchKey(parameters)]

    def _of(self, parameters: int) -> list[BatchKey]:
        return sorted(batch_key for batch_key in self._batches if batch_key.parameters == parameters)

    # ---- what runs ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        """Rows of all batches, preempted ones included."""
        return [row for batch in self._batches.values() for row in batch.rows] + self.preempted

    @property
    def joining(self) -> list[Joining]:
        return [joining for batch in self._batches.values() for joining in batch.joining]

    @property
    def recoveries(self) -> list[Recovery]:
        """Rows whose tokens are being read again."""
        return [recovery for batch in self._batches.values() for recovery in batch.recoveries]

    @property
    def size(self) -> int:
        return sum(batch.size for batch in self._batches.values())

    @property
    def held_cells(self) -> int:
        """KV columns over all rows that the batches with rows could come to fill."""
        return sum(batch.cells(0, batch.longest) for batch in self._batches.values() if self._holds(batch))

    @property
    def idle_cells(self) -> int:
        """KV columns over all rows of batches that keep their arrays for the next rows."""
        return sum(batch.store.allocated_cells for batch in self._batches.values() if not self._holds(batch))

    @property
    def nbytes(self) -> int:
        """KV memory of all batches, bytes."""
        return sum(batch.store.nbytes for batch in self._batches.values())

    @property
    def filled_cells(self) -> int:
        """KV columns over all rows that hold something."""
        return sum(batch.filled_cells for batch in self._batches.values())

    @property
    def reading(self) -> bool:
        """True if groups join, or rows come back."""
        return any(batch.reading for batch in self._batches.values())

    @property
    def active(self) -> bool:
        return any(batch.active for batch in self._batches.values())

    @property
    def steps(self) -> int:
        """Steps of all batches, those that are gone included."""
        return self._steps_before + sum(batch.steps for batch in self._batches.values())

    @property
    def prefilled(self) -> int:
        """Prompt tokens read by all batches, those that are gone included."""
        return self._prefilled_before + sum(batch.prefilled for batch in self._batches.values())

    @property
    def sets(self) -> tuple[int, ...]:
        """Numbers of the parameter sets that have a batch."""
        return tuple(sorted({batch_key.parameters for batch_key in self._batches}))

    def classes(self, parameters: int) -> int:
        """Batches of a set that have rows."""
        return sum(self._holds(self._batches[batch_key]) for batch_key in self._of(parameters))

    def columns(self, batch_key: BatchKey, length: int) -> int:
        """The most columns that a row of this batch can fill once one of `length` joined."""
        return max(length, self._batches[batch_key].longest) if batch_key in self._batches else length

    def cells(self, batch_key: BatchKey, count: int, length: int) -> int:
        """KV columns over all rows of all batches once `count` more rows of at most `length` joined one of them.
        Batches without rows count for nothing: they make room."""
        batch = self._batches.get(batch_key)
        others = (other for key, other in self._batches.items() if key != batch_key and self._holds(other))
        own = batch.cells(count, self.columns(batch_key, length)) if batch else self._store.minimum_cells(count, length)
        return own + sum(other.cells(0, other.longest) for other in others)

    @staticmethod
    def _holds(batch: Batch) -> bool:
        return bool(batch.active or batch.joining)

    # ---- joining and leaving --------------------------------------------------------------------------------------

    def join(self, admission: Admission) -> None:
        """See `Batch.join`."""
        batch_key, columns = admission.key, admission.group.columns_soon
        with self._blame(batch_key):
            siblings = (batch.sibling(admission.group) for batch in self._batches.values())
            sibling = next(filter(None, siblings), None)
            self.open(batch_key, admission.count, columns).join(admission, self.columns(batch_key, columns), sibling)

    def open(self, batch_key: BatchKey, count: int, length: int) -> Batch:
        """A batch, made if need be, which `count` rows of `length` are about to join; others that have no rows give
        their KV back."""
        for key in [key for key, batch in self._batches.items() if not self._holds(batch)]:
            if key != batch_key:
                self._drop(key)
        if batch_key not in self._batches:
            self._batches[batch_key] = self._make(batch_key.parameters)
        self._ledger.leave_rest(rows=self.cells(batch_key, count, length))
        return self._batches[batch_key]

    def keep(self, sets: Collection[int]) -> None:
        """Batches without rows whose set is not among these, or has others, give their KV back."""
        for batch_key in self._batches.keys() - {FIRST, *map(BatchKey, sets)}:
            if not self._holds(self._batches[batch_key]):
                self._drop(batch_key)

    def drop_idle(self) -> None:
        """Batches without rows give their KV back."""
        self.keep(())
        if FIRST in self._batches and not self._holds(self._batches[FIRST]):
            self._batches[FIRST].shrink()

    def shrink(self) -> None:
        """Gives back KV that no row needs; no step may be in flight."""
        self.keep(())
        for batch_key, batch in self._batches.items():
            with self._blame(batch_key):
                batch.shrink()

    def _drop(self, batch_key: BatchKey) -> None:
        gone = self._batches.pop(batch_key)
        self._steps_before += gone.steps
        self._prefilled_before += gone.prefilled
        if not self._batches:  # One is always there: it knows what rows take that are still to join another.
            self._batches[FIRST] = self._make(BASE_SET)

    def look_up(self) -> None:
        """See `Batch.look_up`."""
        for batch_key, batch in self._batches.items():
            with self._blame(batch_key):
                batch.look_up()

    def prefill(self, budget: int) -> list[Row]:
        """See `Batch.prefill`. One batch at a time, in turn: each forward is a pass over the weights."""
        reading = sorted(key for key, batch in self._batches.items() if batch.reading)
        self._read_last = next((key for key in reading if key > self._read_last), min(reading, default=FIRST))
        if self._read_last not in self._batches:
            return []
        with self._blame(self._read_last):
            return self._batches[self._read_last].prefill(budget)

    def release(self, *, few: bool = False) -> None:
        """See `Batch.release`."""
        ended = [row for row in self.preempted if not row.running]
        self.preempted = [row for row in self.preempted if row.running]
        self._sink.release(ended)
        for batch_key, batch in list(self._batches.items()):
            with self._blame(batch_key):
                gone = batch.release(few=few)
            self._sink.release(gone)

    def drop_cancelled(self) -> None:
        """See `Batch.drop_cancelled`."""
        for batch_key, batch in list(self._batches.items()):
            with self._blame(batch_key):
                dropped = batch.drop_cancelled()
            self._sink.drop(dropped)

    def move(self, row: Row, parameters: int) -> bool:
        """Takes a row to a batch of another set, with the KV it has; no step may be in flight. False, and the row is
        in no batch any more, where there is no room for it."""
        return self._shift(row, self._home(row), lambda: self.key_for(parameters, 1, row.offset + 1))

    def _home(self, row: Row) -> BatchKey:
        return next(key for key in self._of(row.placement.parameters) if self._batches[key].seats(row))

    def _shift(self, row: Row, source: BatchKey, target: Callable[[], BatchKey]) -> bool:
        with self._blame(row):
            with self._blame(source):
                kept = self._batches[source].take_out(row)
                batch_key = target()
                fits = self._fits(batch_key, row)
            if fits:
                columns = row.columns_soon
                with self._blame(batch_key):
                    self.open(batch_key, 1, columns).put_in(row, kept, self.columns(batch_key, columns))
        return fits

    def _fits(self, batch_key: BatchKey, row: Row) -> bool:
        """Returns whether there is room for a row that comes from another batch."""
        return self._ledger.fits(rows=self.cells(batch_key, 1, row.columns_soon))

    # ---- memory at its limit --------------------------------------------------------------------------------------

    @property
    def cells_after_step(self) -> int:
        """KV columns over all rows of all batches once the next step is done."""
        return sum(batch.cells_after_step for batch in self._batches.values())

    def may_grow_to(self, cells: int) -> None:
        """Before a step: batches that have to grow for it may grow by more, as far as all rows come to at most
        `cells` columns."""
        for batch in filter(self._holds, self._batches.values()):
            others = self.held_cells - batch.cells(0, batch.longest)
            batch.store.may_grow_to(batch.width, cells - others)

    @property
    def kv_users(self) -> list[KVUser]:
        """Rows and joining groups, for which of them steps aside."""
        held = []
        for batch_key, batch in self._batches.items():
            ages = ((age_of(row.group, row.sample_index), row) for row in batch.rows)
            held += [KVUser(age, batch_key, 1, row.offset + 1, row) for age, row in ages]
            for each in batch.joining:
                width, age = len(each.prompt.tokens) + 1, age_of(each.group, each.first_sample)
                held.append(KVUser(age, batch_key, each.count, width, joining=each))
        return held

    def minimum_cells(self, users: Sequence[KVUser]) -> int:
        """KV columns over all rows that these alone would fill."""
        total = 0
        for batch_key, batch in self._batches.items():
            mine = [user for user in users if user.key == batch_key]
            width = max((user.width for user in mine), default=0)
            total += batch.store.minimum_cells(sum(user.count for user in mine), width)
        return total

    def evict(self, row: Row) -> None:
        """Drops the KV of a row, which waits to come back; no step may be in flight."""
        batch_key = self._home(row)
        with self._blame(batch_key), self._blame(row):
            self._batches[batch_key].evict(row)
        self.preempt(row)

    def preempt(self, row: Row) -> None:
        """Lets a row that is in no batch wait to come back."""
        row.evicted = True
        self.preempted = sorted([*self.preempted, row], key=lambda row: age_of(row.group, row.sample_index))

    def unjoin(self, joining: Joining) -> None:
        """See `Batch.unjoin`."""
        for batch in self._batches.values():
            if joining in batch.joining:
                batch.unjoin(joining)

    def recover(self, row: Row, batch_key: BatchKey, runs: Sequence[RecomputeRun]) -> None:
        """Takes a preempted row back; no step may be in flight."""
        with self._blame(batch_key), self._blame(row):
            self.preempted.remove(row)
            self.open(batch_key, 1, row.columns_soon).recover(row, runs, self.columns(batch_key, row.columns_soon))

    # ---- length buckets -------------------------------------------------------------------------------------------

    def key_for(self, parameters: int, count: int, width: int) -> BatchKey:
        """Where `count` rows that have `width` columns now would run on a set."""
        here = self._of(parameters)
        busy = {batch_key.bucket: self._batches[batch_key] for batch_key in here if self._batches[batch_key].size}
        if not busy:
            return here[0] if here else BatchKey(parameters)
        shapes = {number: Shape(batch.size, batch.width) for number, batch in busy.items()}
        return BatchKey(parameters, self._buckets.choose(shapes, count, width))

    def learn_costs(self) -> None:
        """Measures what steps cost, where the memory for it is there; while rows run they would all wait for it."""
        if self._measure and self._ledger.fits(MEASURED_CELLS):
            self._ledger.leave_rest(rows=self.held_cells + MEASURED_CELLS)
            self._buckets.costs = self._measure(MEASURED_WIDTH)

    def rearrange(self) -> None:
        """Once in a while, moves rows that should run in another bucket by now, as far as there is room."""
        self._turns += 1
        if self._measure is None or self._turns % ARRANGED_EVERY:
            return
        if not (moves := [move for parameters in self.sets for move in self._moves(parameters)]):
            return
        self.settle_and_release()
        sources = set()
        for row, batch_key in moves:
            if row.running and not row.evicted and self._fits(batch_key, row):
                source = self._home(row)
                sources.add(source)
                self._shift(row, source, partial(_given, batch_key))
        for source in sources & self._batches.keys():
            with self._blame(source):
                self._batches[source].shrink()

    def _moves(self, parameters: int) -> list[tuple[Row, BatchKey]]:
        here = self._of(parameters)
        if any(self._batches[batch_key].joining for batch_key in here):
            return []
        rows = [(row, key) for key in here for row in self._batches[key].rows if row.running and not row.evicted]
        if len({(row.offset, key) for row, key in rows}) <= 1:
            return []  # all alike, and together
        found = self._buckets.moves([row.offset + 1 for row, _ in rows], [key.bucket for _, key in rows])
        return [(row, BatchKey(parameters, at)) for (row, key), at in zip(rows, found, strict=True) if at != key.bucket]

    # ---- stepping -------------------------------------------------------------------------------------------------

    @property
    def flying(self) -> bool:
        """True if rows sit, and a step of theirs is in flight in every batch that has some."""
        seated = [batch for batch in self._batches.values() if batch.seated]
        return bool(seated) and all(batch.in_flight for batch in seated)

    def step(self) -> None:
        """One step of every batch that has rows."""
        for batch_key, batch in list(self._batches.items()):
            if batch.active:
                with self._blame(batch_key):
                    read = batch.step()
                self._sink.progress(read)

    def settle(self) -> None:
        """Reads every step in flight without launching another."""
        for batch_key, batch in list(self._batches.items()):
            with self._blame(batch_key):
                read = batch.settle()
            self._sink.progress(read)

    def settle_and_release(self) -> None:
        """No step is in flight afterwards, and no row that ended has a place."""
        self.settle()
        self.release()

    def fail(self) -> tuple[list[Row], list[Joining]]:
        """The rows and joining groups that a failure took along: of the batch that was being computed, or of all. They
        are in no batch any more."""
        at = self._blame.of(tuple)
        # One that was still to be made has taken nothing along but the row or group it was made for.
        failed = [batch_key for batch_key in self._batches if batch_key in at] if at else list(self._batches)
        rows = [row for batch_key in failed for row in self._batches[batch_key].rows]
        joining = [group for batch_key in failed for group in self._batches[batch_key].joining]
        # A row that was on its way from one batch to another was in neither.
        rows += [row for row in self._blame.of(Row) if row not in rows]
        for batch_key in failed:
            self._drop(batch_key)
        return rows, joining


def _given(batch_key: BatchKey) -> BatchKey:
    return batch_key
