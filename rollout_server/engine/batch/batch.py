"""Rows that decode together: who joins, reads a prompt, is seated, and leaves. `decoder` computes their steps.

Rows join and move only when no step is in flight; the place of a row that ended is freed when no step in flight
computes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from adapters.placement import Placement
from rollout_server.engine.batch.decoder import Decoder
from rollout_server.engine.batch.joining import Admission, Joining
from rollout_server.engine.batch.prefix_reuse import Prefixes, key_of
from rollout_server.engine.batch.recompute import RecomputeRun, Recoveries, Recovery
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.sizes import plan
from rollout_server.engine.kv_cache.store import KVStore, Reading, Seating
from rollout_server.engine.timeline import Timeline
from rollout_server.text.detokenize import IncrementalText

MOST_KEPT = 16
"""Rows whose KV is kept in one turn while others run or wait to be told: a copy for each layer of each."""


class Batch:
    """`decoder` steps the rows that sit in `store`; `forward` reads prompts. `route(slots)` tells the adapter layers
    which slot each row of the next forward uses, `reroute` aims it at any placement. `prefixes` is the prefix cache.
    Where waiting samples cannot copy their prompt from running ones, it is kept for them if `ledger` has room."""

    def __init__(
        self,
        forward: Reading,
        store: KVStore,
        decoder: Decoder,
        route: Callable[[Sequence[int]], None],
        reroute: Callable[[Placement], None],
        tokenizer: Any,
        ledger: KVLedger,
        prefixes: Prefixes | None = None,
        *,
        timeline: Timeline,
    ) -> None:
        self._recovering = Recoveries(forward, store, reroute)
        self._forward = forward
        self.store = store
        self._decoder = decoder
        self._route = route
        self._tokenizer = tokenizer
        self._seats: dict[int, Row] = {}
        self._leaving: list[Row] = []
        """Rows whose places are being freed: in neither list if that fails."""
        self.joining: list[Joining] = []
        self._extent: tuple[int, int] | None = None
        self._prefixes = prefixes
        self._ledger = ledger
        self._timeline = timeline
        self._most_leaving = MOST_KEPT if prefixes is not None else sys.maxsize
        self.prefilled = 0
        """Prompt tokens read since it was made."""

    # ---- what runs ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Row]:
        return [*self._seats.values(), *self.returning, *self._leaving]

    @property
    def returning(self) -> list[Row]:
        """Rows whose tokens are being read again."""
        return [recovery.row for recovery in self._recovering.open]

    @property
    def recoveries(self) -> list[Recovery]:
        """Rows whose tokens are being read again, and what is read of each."""
        return self._recovering.open

    @property
    def size(self) -> int:
        """Places taken, by rows and by prompts on their way."""
        return len(self._seats) + len(self._recovering.open) + sum(joining.count for joining in self.joining)

    @property
    def longest(self) -> int:
        """The most columns any of them needs soon."""
        return max([self._extents[1], *(each.group.columns_soon for each in self.joining)])

    @property
    def width(self) -> int:
        """Columns the next step needs for its longest row; prompts on their way count as read."""
        return 1 + max([self._extents[0], *(len(each.prompt.tokens) for each in self.joining)])

    @property
    def _extents(self) -> tuple[int, int]:
        """The column of the longest row's next token (−1 without rows), and the most columns that one needs soon. Kept
        from one step to the next, since each turn asks several times."""
        if self._extent is None:
            rows = self.rows
            self._extent = (
                max([row.offset for row in rows], default=-1),
                max([row.columns_soon for row in rows], default=0),
            )
        return self._extent

    def _changed(self) -> None:
        self._extent = None
        self._decoder.seats_changed()

    def seats(self, row: Row) -> bool:
        return any(seated is row for seated in self.rows)

    @property
    def cells_after_step(self) -> int:
        """KV columns over all rows once the next step is done."""
        return self.store.cells_after_step(self.width) if self.size else 0

    def cells(self, count: int, columns: int) -> int:
        """KV columns over all rows that the cache could come to fill, see `store.KVStore.cells`."""
        return self.store.cells(count, columns)

    @property
    def filled_cells(self) -> int:
        """KV columns over all rows that hold something."""
        read = sum(joining.prompt.prefilled for joining in self.joining)
        return read + sum(row.offset for row in self._seats.values())

    @property
    def reading(self) -> bool:
        """True if groups join, or rows come back."""
        return bool(self.joining or self._recovering.open)

    @property
    def active(self) -> bool:
        return bool(self._seats or self._recovering.open) or self._decoder.in_flight

    @property
    def seated(self) -> bool:
        """True if rows sit."""
        return bool(self._seats)

    @property
    def in_flight(self) -> bool:
        return self._decoder.in_flight

    @property
    def steps(self) -> int:
        return self._decoder.steps

    # ---- joining --------------------------------------------------------------------------------------------------

    def join(self, admission: Admission, columns: int, sibling: tuple[KVStore, int] | None = None) -> None:
        """Reserves places; no step may be in flight. No row may exceed `columns`. A group whose prompt is there skips
        prefill: kept, in the place of a `sibling`, or where one has left it."""
        group = admission.group
        if group.prompt is None:
            group.prompt = Prompt(group.request.given_ids[:-1], group.placement.slot, owner=group, sight=group.sight)
        self.store.begin(group.prompt, admission.count, columns)
        if sibling is not None and not group.prompt.done:
            self.store.inherit(group.prompt, *sibling)
        # There may be more places now, and rows go on while the prompt is read.
        self._changed()
        group.joining = admission.count
        self.joining.append(Joining(group, group.prompt, admission.count, group.admitted))

    def sibling(self, group: Group) -> tuple[KVStore, int] | None:
        """Store and place of a row that holds this group's prompt; None if no row does."""
        places = [place for place, row in self._seats.items() if row.group is group and row.holds_prompt]
        return (self.store, places[0]) if places and self.store.cuts else None

    def look_up(self) -> None:
        """Gives prompts that join what there is of them from before. No step in flight."""
        if self._prefixes is not None:
            self._prefixes.enter([joining.group for joining in self.joining])

    def prefill(self, budget: int) -> list[Row]:
        """Feeds at most about `budget` prompt tokens; returns the rows that are ready to decode. No step in flight."""
        budget -= self._recover(budget) if self._recovering.open else 0
        self.look_up()
        while budget > 0 and (read := self._read(budget)):
            budget -= read
        # When all is read: a row that sat down before a failure would be one that nobody was told of.
        rows = self._seat_returning() if self._recovering.open else []
        ready = [joining for joining in self.joining if joining.prompt.done]
        # What is kept for later may leave no room to keep the next.
        for some in [ready] if self.store.cuts else [[joining] for joining in ready]:
            rows += self._seat(some)
        return rows

    def _read(self, budget: int) -> int:
        """Feeds prompts once, at most about `budget` tokens; returns how many if there is more to feed in this turn."""
        ready = [each for each in self.joining if each.prompt.looked_up or self._prefixes is None]
        planned = plan([each.prompt.ahead for each in ready], budget)
        if not planned:
            return 0
        chosen = [(index, ready[index].prompt.chunk(count)) for index, count in planned]
        tokens = sum(count for _, count in chosen)
        with self._timeline.part("read") as part:
            part.note(tokens=tokens, prompts=len(chosen))
            self.store.prefill(self._forward, [(ready[index].prompt, count) for index, count in chosen], self._route)
        self.prefilled += tokens
        stopped = self._prefixes is not None and self._prefixes.keep_read([ready[index].group for index, _ in chosen])
        return tokens if stopped else 0

    def _seat(self, ready: Sequence[Joining]) -> list[Row]:
        if not ready:
            return []
        seatings = [Seating(joining.prompt, joining.count, self._keeps(joining)) for joining in ready]
        seated = self.store.seat(seatings)
        if self._prefixes is not None:
            first = zip(ready, seated, strict=True)
            self._prefixes.keep_prompts([(places[0], joining.group, joining.prompt) for joining, places in first])
        rows = []
        for joining, seating, places in zip(ready, seatings, seated, strict=True):
            rows += self._sit_down(joining, places, keep=seating.keep)
            self.joining.remove(joining)
        self._changed()
        return rows

    def _keeps(self, joining: Joining) -> bool:
        """Returns whether a group's prompt is kept for those of its samples that wait."""
        if self.store.cuts or not joining.group.waiting:
            return False
        return self._ledger.fits(self.store.minimum_cells(1, len(joining.prompt.tokens)))

    def _sit_down(self, joining: Joining, places: Sequence[int], *, keep: bool) -> list[Row]:
        group = joining.group
        if group.version is None:
            raise RuntimeError("A group is seated before it has a version.")
        seated_at = time.monotonic()
        group.prefilled_at = group.prefilled_at or seated_at
        rows = []
        for i, place in enumerate(places):
            index = joining.first_sample + i
            text = IncrementalText.of(self._tokenizer, group.request) if group.request.sampling.stop else None
            seed = group.request.seeds[index]
            row = Row(group, index, seed, group.version, group.placement, text, seated_at=seated_at)
            self._seats[place] = row
            rows.append(row)
        if not keep:
            group.prompt = None
        group.joining = 0
        return rows

    # ---- leaving --------------------------------------------------------------------------------------------------

    def release(self, *, few: bool = False) -> list[Row]:
        """Frees the places of rows that ended and that no step in flight computes; returns those rows. Where freeing
        would move other rows it waits until nothing is in flight. `few`: only so many that others need not wait long
        for what is kept of them."""
        flying = self._decoder.in_flight
        if not flying and not all(recovery.row.running for recovery in self._recovering.open):
            ended, places = self._recovering.take(lambda row: not row.running)
            self._vacate(places, places)
            return ended + self.release()
        gone = {p: row for p, row in self._seats.items() if not row.running and not self._decoder.computes(row)}
        if few:
            gone = dict(islice(gone.items(), self._most_leaving))
        if not gone or (flying and self.store.moves_on_leave(len(gone))):
            return []
        self._leaving = list(gone.values())
        for place in gone:
            del self._seats[place]
        if self._prefixes is not None:
            self._decoder.copy(self._prefixes.keep_rows(gone, self._decoder.steps))
        scrub = [place for place, row in gone.items() if not row.finite]
        self.store.remember({p: row.group for p, row in gone.items() if row.group.waiting and row.holds_prompt})
        self._vacate(list(gone), scrub)
        self._leaving = []
        return list(gone.values())

    def recover(self, row: Row, runs: Sequence[RecomputeRun], columns: int) -> None:
        """See `Recoveries.begin`. What others have left of its beginning is not read again."""
        prompt, (end, placement, version) = self._recovering.begin(row, runs, columns), runs[0]
        if self._prefixes is not None:
            self._prefixes.recall(prompt, key_of(version, placement), end)
        self._changed()

    def _recover(self, budget: int) -> int:
        """Reads rows again that come back; returns how many tokens of about `budget`."""
        before = self._recovering.unread
        with self._timeline.part("recompute") as part:
            self._recovering.prefill(budget)
            if fed := before - self._recovering.unread:
                part.note(tokens=fed)
        self.prefilled += fed
        return fed

    def _seat_returning(self) -> list[Row]:
        """Rows that are back."""
        back: list[Row] = []

        def seat(place: int, row: Row) -> None:
            row.last_step, row.evicted, row.finite = -1, False, False
            self._seats[place] = row
            self._changed()
            back.append(row)

        self._recovering.seat(seat)
        return back

    def evict(self, row: Row) -> None:
        """Drops the KV of a row; no step may be in flight."""
        _, places = self._recovering.take(lambda other: other is row)
        places += [place for place, seated in self._seats.items() if seated is row]
        self._seats = {place: seated for place, seated in self._seats.items() if place not in places}
        self._vacate(places, [])

    def unjoin(self, joining: Joining) -> None:
        """Forgets what was read of a prompt; no step may be in flight."""
        self._forget([joining])

    def take_out(self, row: Row) -> list[Any]:
        """The KV of a row, which gives its place back; no step may be in flight."""
        place = next(place for place, seated in self._seats.items() if seated is row)
        kept = self.store.copy(place, row.offset)
        del self._seats[place]
        # What it computed was read and is finite, so there is nothing to scrub.
        self._vacate([place], [])
        return kept

    def put_in(self, row: Row, kept: list[Any], columns: int) -> None:
        """Seats a row that another batch had; no step may be in flight, and no row may exceed `columns`."""
        moved = Prompt((0,) * row.offset, row.placement.slot, prefilled=row.offset, kept=kept)
        self.store.begin(moved, 1, columns)
        ((place,),) = self.store.seat([Seating(moved, 1)])
        self._seats[place] = row
        row.last_step = -1
        self._changed()

    def drop_cancelled(self) -> list[Joining]:
        """Gives back the places of groups that were aborted before their rows were seated. No step in flight."""
        dropped = [joining for joining in self.joining if joining.group.cancelled]
        self._forget(dropped)
        return dropped

    def _forget(self, dropped: Sequence[Joining]) -> None:
        self.joining = [joining for joining in self.joining if joining not in dropped]
        # All at once: freeing places one by one could move those still to be freed.
        places = [place for joining in dropped for place in joining.prompt.places]
        if places:
            self._vacate(places, places)
        for joining in dropped:
            self.store.cancel(joining.prompt, joining.count)
            joining.group.prompt = None
            joining.group.joining = 0

    def _vacate(self, places: Sequence[int], scrub: Sequence[int]) -> None:
        self._follow(self.store.leave(places, scrub))

    def shrink(self) -> None:
        """Gives back KV that no row needs; no step may be in flight."""
        self._follow(self.store.shrink(self.width if self.rows or self.joining else 0))

    def _follow(self, moved: dict[int, int] | None) -> None:
        self._changed()
        if moved is None:
            return
        if self._recovering.open:
            self._recovering.follow(moved)
        self._seats = {moved[place]: row for place, row in self._seats.items()}
        for joining in self.joining:
            joining.prompt.places = [moved[place] for place in joining.prompt.places]

    @property
    def must_settle(self) -> bool:
        """True if rows that ended wait for the step in flight, because others would move."""
        ended = min(sum(not row.running for row in self._seats.values()), self._most_leaving)
        return self._decoder.in_flight and ended > 0 and self.store.moves_on_leave(ended)

    # ---- stepping -------------------------------------------------------------------------------------------------

    def step(self) -> list[Row]:
        """See `Decoder.step`. Where rows that ended wait for the step in flight, it is read and none dispatched."""
        read = self._decoder.settle() if self.must_settle else self._decoder.step(self._seats)
        self._extent = None
        return read

    def settle(self) -> list[Row]:
        """See `Decoder.settle`."""
        return self._decoder.settle()
