"""One batch for each parameter set that rows run on, behind the face of one: a forward reads one set of weights, so
rows of another set cost another pass.

A batch is made when the first group needs it. One without rows keeps its KV for the next rows of its set until another
batch needs room or its set is gone. What is computed comes row by row, one batch after another, as it is read: where a
batch fails, the rows of those before it have been told of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from adapters.sets import BASE_SET
from rollout_server.engine.batch import Batch, Joining
from rollout_server.engine.scheduler import Admission
from rollout_server.engine.sequence import Sequence as Row

T = TypeVar("T")


class Batches:
    """`make(parameters)` gives an empty batch whose forwards run on that parameter set."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._batches: dict[int, Batch] = {BASE_SET: make(BASE_SET)}
        self._steps_before = 0
        self._at: int | None = None
        """The set whose batch is being computed: what a failure is blamed on."""
        self._moving: Row | None = None

    def __getitem__(self, parameters: int) -> Batch:
        """Raises `KeyError` where no row has run on this set lately."""
        return self._batches[parameters]

    # ---- what runs ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self._batches.values() for row in batch.rows]

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
    def nbytes(self) -> int:
        """KV memory of all batches, bytes."""
        return sum(batch.nbytes for batch in self._batches.values())

    @property
    def filled_cells(self) -> int:
        """KV columns over all rows that hold something."""
        return sum(batch.filled_cells for batch in self._batches.values())

    @property
    def active(self) -> bool:
        return any(batch.active for batch in self._batches.values())

    @property
    def steps(self) -> int:
        """Steps of all batches, those that are gone included."""
        return self._steps_before + sum(batch.steps for batch in self._batches.values())

    @property
    def sets(self) -> tuple[int, ...]:
        """Those that have a batch."""
        return tuple(self._batches)

    def longest(self, parameters: int) -> int:
        """The most columns that a row on this set can fill."""
        return self._batches[parameters].longest if parameters in self._batches else 0

    def cells(self, parameters: int, count: int, columns: int) -> int:
        """KV columns over all rows of all batches once `count` more rows joined on this set and none of its rows is
        longer than `columns`. Batches without rows count for nothing: they make room."""
        batch = self._batches.get(parameters) or self._make(parameters)
        others = (other for number, other in self._batches.items() if number != parameters and self._holds(other))
        return batch.cells(count, columns) + sum(other.cells(0, other.longest) for other in others)

    @staticmethod
    def _holds(batch: Batch) -> bool:
        return bool(batch.active or batch.joining)

    # ---- joining and leaving --------------------------------------------------------------------------------------

    def join(self, admission: Admission) -> None:
        """See `Batch.join`."""
        self._at = admission.group.placement.parameters
        self.open(self._at).join(admission)
        self._at = None

    def open(self, parameters: int) -> Batch:
        """The batch of a set, made if need be; others that have no rows give their KV back."""
        for number in [number for number, batch in self._batches.items() if not self._holds(batch)]:
            if number != parameters:
                self._drop(number)
        if parameters not in self._batches:
            self._batches[parameters] = self._make(parameters)
        return self._batches[parameters]

    def keep(self, sets: Collection[int]) -> None:
        """Batches without rows whose set is not among these give their KV back."""
        for number in self._batches.keys() - {BASE_SET, *sets}:
            if not self._holds(self._batches[number]):
                self._drop(number)

    def shrink(self) -> None:
        """Gives back KV that no row needs; no step may be in flight."""
        self.keep(())
        for parameters, batch in self._batches.items():
            self._at = parameters
            batch.shrink()
        self._at = None

    def _drop(self, parameters: int) -> None:
        self._steps_before += self._batches.pop(parameters).steps

    def prefill(self, budget: int) -> Iterator[Row]:
        """See `Batch.prefill`; the budget is shared."""
        joining = sum(bool(batch.joining) for batch in self._batches.values())
        return self._each(lambda batch: batch.prefill(max(1, budget // joining)) if batch.joining else [])

    def release(self) -> Iterator[Row]:
        return self._each(Batch.release)

    def drop_cancelled(self) -> Iterator[Joining]:
        return self._each(Batch.drop_cancelled)

    def move(self, row: Row, parameters: int, kv_cells: int) -> bool:
        """Takes a row to the batch of another set, with the KV it has; no step may be in flight. False, and the row is
        in no batch any more, where all batches would then fill more than `kv_cells` columns."""
        self._at, self._moving = row.placement.parameters, row
        kept = self._batches[self._at].take_out(row)
        columns = max(self.longest(parameters), row.group.length)
        fits = self.cells(parameters, 1, columns) <= kv_cells
        if fits:
            self._at = parameters
            self.open(parameters).put_in(row, kept, columns)
        self._at = self._moving = None
        return fits

    # ---- stepping -------------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Row]:
        """One step of every batch that has rows."""
        return self._each(lambda batch: batch.step() if batch.active else [])

    def settle(self) -> Iterator[Row]:
        return self._each(Batch.settle)

    def _each(self, do: Callable[[Batch], Sequence[T]]) -> Iterator[T]:
        for parameters, batch in list(self._batches.items()):
            self._at = parameters
            done = do(batch)
            self._at = None
            yield from done

    def fail(self) -> tuple[list[Row], list[Joining]]:
        """The rows and joining groups that a failure took along: of the batch that was being computed, or of all. They
        are in no batch any more."""
        failed = [self._at] if self._at is not None and self._at in self._batches else list(self._batches)
        self._at = None
        rows = [row for number in failed for row in self._batches[number].rows]
        joining = [group for number in failed for group in self._batches[number].joining]
        if self._moving is not None and self._moving not in rows:
            rows.append(self._moving)
        self._moving = None
        for number in failed:
            self._drop(number)
        return rows, joining
