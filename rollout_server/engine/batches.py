"""Batches behind the face of one. Each parameter set that rows run on has its own, since a forward reads one set of
weights; where rows of one set differ much in length it has one for each class of lengths, see `lengths`.

A batch is made when the first group needs it. One without rows keeps its KV for the next rows of its set until another
batch needs room or its set is gone. What is computed comes row by row, one batch after another, as it is read: where a
batch fails, the rows of those before it have been told of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeVar

from adapters.sets import BASE_SET
from rollout_server.engine.batch import Batch
from rollout_server.engine.flight import Joining
from rollout_server.engine.holders import FIRST, Berth, Holder, age_of
from rollout_server.engine.lengths import Shape, StepCosts, cheapest, plan
from rollout_server.engine.recovery import Leg
from rollout_server.engine.scheduler import Admission
from rollout_server.engine.sequence import Sequence as Row

T = TypeVar("T")

MEASURED_WIDTH = 1024
MEASURED_CELLS = 5 * MEASURED_WIDTH
"""At least what measuring fills."""
ARRANGED_EVERY = 16
"""Turns."""


class Batches:
    """`make(parameters)` gives an empty batch whose forwards run on that parameter set; all together fill at most
    `kv_cells` columns. `measure(width)` says what steps cost; None where rows cannot be put into classes.
    `leave_room(cells)` is told before rows come to fill so many columns."""

    def __init__(
        self,
        make: Callable[[int], Batch],
        kv_cells: int,
        measure: Callable[[int], StepCosts] | None = None,
        leave_room: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._make = make
        self._kv_cells = kv_cells
        self._measure = measure
        self._leave_room = leave_room
        self._costs: StepCosts | None = None
        self._batches: dict[Berth, Batch] = {FIRST: make(BASE_SET)}
        self._store = make(BASE_SET).store
        """Never filled: says what rows take where there is no batch yet."""
        self._steps_before = self._fed_before = 0
        self._turns = 0
        self._fed_last = FIRST
        self._at: Berth | None = None
        """The batch that is being computed: what a failure is blamed on."""
        self._moving: Row | None = None
        self.aside: list[Row] = []
        """Rows whose KV was dropped and that wait to come back, oldest first."""

    def __getitem__(self, parameters: int) -> Batch:
        """The first batch of a set. Raises `KeyError` where no row has run on this set lately."""
        return self._batches[self._of(parameters)[0]] if self._of(parameters) else self._batches[parameters, 0]

    def _of(self, parameters: int) -> list[Berth]:
        return sorted(berth for berth in self._batches if berth[0] == parameters)

    # ---- what runs ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        """Those that stepped aside included."""
        return [row for batch in self._batches.values() for row in batch.rows] + self.aside

    @property
    def joining(self) -> list[Joining]:
        return [joining for batch in self._batches.values() for joining in batch.joining]

    @property
    def size(self) -> int:
        return sum(batch.size for batch in self._batches.values())

    @property
    def unread(self) -> int:
        """Prompt tokens that joining groups still have to read."""
        return sum(batch.unread for batch in self._batches.values())

    @property
    def held_cells(self) -> int:
        """KV columns over all rows that the batches with rows could come to fill."""
        return sum(batch.cells(0, batch.longest) for batch in self._batches.values() if self._holds(batch))

    @property
    def idle_cells(self) -> int:
        """KV columns over all rows of batches that keep their arrays for the next rows."""
        return sum(batch.store.held for batch in self._batches.values() if not self._holds(batch))

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
        """Whether groups join, or rows come back."""
        return any(batch.reading for batch in self._batches.values())

    @property
    def active(self) -> bool:
        return any(batch.active for batch in self._batches.values())

    @property
    def steps(self) -> int:
        """Steps of all batches, those that are gone included."""
        return self._steps_before + sum(batch.steps for batch in self._batches.values())

    @property
    def fed(self) -> int:
        """Prompt tokens read by all batches, those that are gone included."""
        return self._fed_before + sum(batch.fed for batch in self._batches.values())

    @property
    def sets(self) -> tuple[int, ...]:
        """Those that have a batch."""
        return tuple(sorted({berth[0] for berth in self._batches}))

    def classes(self, parameters: int) -> int:
        """Batches of a set that have rows."""
        return sum(self._holds(self._batches[berth]) for berth in self._of(parameters))

    def columns(self, berth: Berth, length: int) -> int:
        """The most columns that a row of this batch can fill once one of `length` joined."""
        return max(length, self._batches[berth].longest) if berth in self._batches else length

    def cells(self, berth: Berth, count: int, length: int) -> int:
        """KV columns over all rows of all batches once `count` more rows of at most `length` joined one of them.
        Batches without rows count for nothing: they make room."""
        batch = self._batches.get(berth)
        others = (other for key, other in self._batches.items() if key != berth and self._holds(other))
        own = batch.cells(count, self.columns(berth, length)) if batch else self._store.packed(count, length)
        return own + sum(other.cells(0, other.longest) for other in others)

    def prompt_cells(self, tokens: int) -> int:
        """KV columns that a prompt takes where it is kept apart from any row."""
        return self._store.packed(1, tokens)

    @staticmethod
    def _holds(batch: Batch) -> bool:
        return bool(batch.active or batch.joining)

    # ---- joining and leaving --------------------------------------------------------------------------------------

    def join(self, admission: Admission) -> None:
        """See `Batch.join`."""
        self._at = admission.berth
        soon = admission.group.soon
        siblings = (batch.sibling(admission.group) for batch in self._batches.values())
        sibling = next(filter(None, siblings), None)
        self.open(admission.berth, admission.count, soon).join(admission, self.columns(admission.berth, soon), sibling)
        self._at = None

    def open(self, berth: Berth, count: int, length: int) -> Batch:
        """A batch, made if need be, which `count` rows of `length` are about to join; others that have no rows give
        their KV back."""
        for key in [key for key, batch in self._batches.items() if not self._holds(batch)]:
            if key != berth:
                self._drop(key)
        if berth not in self._batches:
            self._batches[berth] = self._make(berth[0])
        self._leave_room(self.cells(berth, count, length))
        return self._batches[berth]

    def keep(self, sets: Collection[int]) -> None:
        """Batches without rows whose set is not among these, or has others, give their KV back."""
        for berth in self._batches.keys() - {FIRST, *((parameters, 0) for parameters in sets)}:
            if not self._holds(self._batches[berth]):
                self._drop(berth)

    def drop_idle(self) -> None:
        """Batches without rows give their KV back."""
        for berth in [berth for berth, batch in self._batches.items() if not self._holds(batch)]:
            if berth == FIRST:
                self._batches[berth].shrink()
            else:
                self._drop(berth)

    def shrink(self) -> None:
        """Gives back KV that no row needs; no step may be in flight."""
        self.keep(())
        for berth, batch in self._batches.items():
            self._at = berth
            batch.shrink()
        self._at = None

    def _drop(self, berth: Berth) -> None:
        gone = self._batches.pop(berth)
        self._steps_before += gone.steps
        self._fed_before += gone.fed
        if not self._batches:  # One is always there: it knows what rows take that are still to join another.
            self._batches[FIRST] = self._make(BASE_SET)

    def prefill(self, budget: int) -> Iterator[Row]:
        """See `Batch.prefill`. One batch at a time, in turn: each forward is a pass over the weights."""
        reading = sorted(berth for berth, batch in self._batches.items() if batch.reading)
        self._fed_last = next((berth for berth in reading if berth > self._fed_last), min(reading, default=FIRST))
        chosen = self._batches.get(self._fed_last)
        return self._each(lambda batch: batch.prefill(budget) if batch is chosen else [])

    def release(self, *, few: bool = False) -> Iterator[Row]:
        ended = [row for row in self.aside if not row.running]
        self.aside = [row for row in self.aside if row.running]
        yield from ended
        yield from self._each(partial(Batch.release, few=few))

    def drop_cancelled(self) -> Iterator[Joining]:
        return self._each(Batch.drop_cancelled)

    def move(self, row: Row, parameters: int) -> bool:
        """Takes a row to a batch of another set, with the KV it has; no step may be in flight. False, and the row is
        in no batch any more, where there is no room for it."""
        return self._shift(row, self._home(row), lambda: self.berth(parameters, 1, row.offset + 1, row.soon))

    def _home(self, row: Row) -> Berth:
        return next(berth for berth in self._of(row.placement.parameters) if self._batches[berth].seats(row))

    def _shift(self, row: Row, source: Berth, target: Callable[[], Berth]) -> bool:
        self._at, self._moving = source, row
        kept = self._batches[source].take_out(row)
        berth = target()
        fits = self.cells(berth, 1, row.soon) <= self._kv_cells
        if fits:
            self._at = berth
            self.open(berth, 1, row.soon).put_in(row, kept, self.columns(berth, row.soon))
        self._at = self._moving = None
        return fits

    # ---- memory at its limit --------------------------------------------------------------------------------------

    @property
    def due(self) -> int:
        """KV columns over all rows of all batches once the next step is done."""
        return sum(batch.due for batch in self._batches.values())

    def stretch(self, cells: int) -> None:
        """Before a step: batches that have to grow for it may grow by more, as far as all rows come to at most
        `cells` columns."""
        for batch in filter(self._holds, self._batches.values()):
            others = self.held_cells - batch.cells(0, batch.longest)
            batch.store.stretch(batch.width, cells - others)

    @property
    def holders(self) -> list[Holder]:
        """Rows and joining groups, for which of them steps aside."""
        held = []
        for berth, batch in self._batches.items():
            held += [Holder(age_of(row.group, row.sample_index), berth, 1, row.offset + 1, row) for row in batch.rows]
            for each in batch.joining:
                width, age = len(each.prompt.tokens) + 1, age_of(each.group, each.first_sample)
                held.append(Holder(age, berth, each.count, width, joining=each))
        return held

    def packed(self, holders: Sequence[Holder]) -> int:
        """KV columns over all rows that these alone would fill."""
        total = 0
        for berth, batch in self._batches.items():
            mine = [holder for holder in holders if holder.berth == berth]
            width = max((holder.width for holder in mine), default=0)
            total += batch.store.packed(sum(holder.count for holder in mine), width)
        return total

    def evict(self, row: Row) -> None:
        """Drops the KV of a row, which waits to come back; no step may be in flight."""
        berth = self._at = self._home(row)
        self._moving = row
        self._batches[berth].evict(row)
        self._at = self._moving = None
        self.set_aside(row)

    def set_aside(self, row: Row) -> None:
        """Lets a row that is in no batch wait to come back."""
        row.away = True
        self.aside = sorted([*self.aside, row], key=lambda row: age_of(row.group, row.sample_index))

    def unjoin(self, joining: Joining) -> None:
        """See `Batch.unjoin`."""
        for batch in self._batches.values():
            if joining in batch.joining:
                batch.unjoin(joining)

    def recover(self, row: Row, berth: Berth, legs: Sequence[Leg]) -> None:
        """Takes a row back that stepped aside; no step may be in flight."""
        self._at, self._moving = berth, row
        self.aside.remove(row)
        self.open(berth, 1, row.soon).recover(row, legs, self.columns(berth, row.soon))
        self._at = self._moving = None

    # ---- classes of lengths ---------------------------------------------------------------------------------------

    def berth(self, parameters: int, count: int, width: int, length: int) -> Berth:
        """Where `count` rows that have `width` columns now, and `length` at most, would run on a set."""
        here = self._of(parameters)
        busy = [berth for berth in here if self._batches[berth].size]
        if not busy:
            return here[0] if here else (parameters, 0)
        shapes = [Shape(self._batches[berth].size, self._batches[berth].width) for berth in busy]
        if self._costs is None:
            return busy[0]
        chosen = cheapest(shapes, count, width, self._costs, self._places, may_open=True)
        if chosen < len(busy):
            return busy[chosen]
        return next((parameters, number) for number in range(len(busy) + 1) if (parameters, number) not in busy)

    def _places(self, rows: int) -> int:
        return self._store.places(rows)

    def learn_costs(self) -> None:
        """Measures what steps cost, where the memory for it is there; while rows run they would all wait for it."""
        if self._measure and self.held_cells + MEASURED_CELLS <= self._kv_cells:
            self._leave_room(self.held_cells + MEASURED_CELLS)
            self._costs = self._measure(MEASURED_WIDTH)

    def moves(self) -> list[tuple[Row, Berth]]:
        """Rows that should run in another class by now; looked at once in a while."""
        self._turns += 1
        if self._measure is None or self._turns % ARRANGED_EVERY:
            return []
        return [move for parameters in {berth[0] for berth in self._batches} for move in self._better(parameters)]

    def _better(self, parameters: int) -> list[tuple[Row, Berth]]:
        here = self._of(parameters)
        seated = [(row, berth) for berth in here for row in self._batches[berth].rows if row.running and not row.away]
        if not seated or any(self._batches[berth].joining for berth in here):
            return []
        widths = [row.offset + 1 for row, _ in seated]
        if self._costs is None:
            return []
        found = plan(widths, [berth[1] for _, berth in seated], self._costs, self._places)
        if found is None:
            return []
        return [(row, (parameters, at)) for (row, berth), at in zip(seated, found, strict=True) if at != berth[1]]

    def rearrange(self, moves: Sequence[tuple[Row, Berth]]) -> None:
        """Moves those that still run, as far as there is room; no step may be in flight."""
        sources = set()
        for row, berth in moves:
            if row.running and not row.away and self.cells(berth, 1, row.soon) <= self._kv_cells:
                source = self._home(row)
                sources.add(source)
                self._shift(row, source, partial(_given, berth))
        for source in sources & self._batches.keys():
            self._at = source
            self._batches[source].shrink()
        self._at = None

    # ---- stepping -------------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Row]:
        """One step of every batch that has rows."""
        return self._each(lambda batch: batch.step() if batch.active else [])

    def settle(self) -> Iterator[Row]:
        return self._each(Batch.settle)

    def _each(self, do: Callable[[Batch], Sequence[T]]) -> Iterator[T]:
        for berth, batch in list(self._batches.items()):
            self._at = berth
            done = do(batch)
            self._at = None
            yield from done

    def fail(self) -> tuple[list[Row], list[Joining]]:
        """The rows and joining groups that a failure took along: of the batch that was being computed, or of all. They
        are in no batch any more."""
        # One that was still to be made has taken nothing along but the row or group it was made for.
        failed = list(self._batches) if self._at is None else [self._at] * (self._at in self._batches)
        self._at = None
        rows = [row for berth in failed for row in self._batches[berth].rows]
        joining = [group for berth in failed for group in self._batches[berth].joining]
        if self._moving is not None and self._moving not in rows:
            rows.append(self._moving)
        self._moving = None
        for berth in failed:
            self._drop(berth)
        return rows, joining


def _given(berth: Berth) -> Berth:
    return berth
