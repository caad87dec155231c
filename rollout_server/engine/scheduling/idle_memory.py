"""What the engine's memory is made of, who comes first, and giving back what nobody uses: most users train on the same
machine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import mlx.core as mx

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.prefix_reuse import PrefixReuse
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.messages.control import Release, Released
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.status import MemoryStatus, PictureStatus
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.scoring.queue import ScoringQueue
from rollout_server.engine.sight.features import Eyes

IDLE_S = 5.0
"""KV of an engine that has had nothing to do for so many seconds is given back."""
FRESH_S = 0.25
"""Memory figures are at most so many seconds old while the engine works."""


def keep_for_later(eyes: Eyes | None, prefix_reuse: PrefixReuse, most: int, cells: int) -> None:
    """Shares KV columns that nobody needs among what is kept for later requests: features of pictures, of which there
    are few, take at most `most`."""
    if eyes is not None:
        eyes.fit(min(cells, most))
        cells = max(0, cells - eyes.cells)
    prefix_reuse.fit(cells)


class Memory:
    """Engine thread only. `clock` is in seconds; `eyes` keep features of pictures, where the model has a tower."""

    def __init__(
        self,
        batches: Batches,
        policies: PolicyTable,
        prefix_reuse: PrefixReuse,
        ledger: KVLedger,
        queue: RequestQueue,
        scoring: ScoringQueue,
        info: ModelInfo,
        clock: Callable[[], float] = time.monotonic,
        eyes: Eyes | None = None,
    ) -> None:
        self._batches = batches
        self._eyes = eyes
        self._prefix_reuse = prefix_reuse
        self._ledger = ledger
        self.releases: deque[Release] = deque()
        """Commands that ask for memory and are not answered yet."""
        self._policies = policies
        self._queue = queue
        self._scoring = scoring
        self._info = info
        self._clock = clock
        self._idle_since: float | None = None
        self._shown: MemoryStatus | None = None
        self._shown_at = 0.0

    def rest(self, busy: bool) -> None:
        """Told every turn whether there is anything to do; gives back once a rest has been long enough."""
        now = self._clock()
        if busy or self._batches.active:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since, self._shown = now, None
        elif now - self._idle_since >= IDLE_S and self._batches.nbytes:
            # What is kept for later requests stays: the next turn of a conversation may be a minute away.
            self._shrink()

    def share_out(self) -> None:
        """Memory priority: rows, then features of pictures and the prefix cache, then arrays of idle batches."""
        held = self._batches.held_cells
        if idle := self._batches.idle_cells:
            kept = self._prefix_reuse.cells + (self._eyes.cells if self._eyes is not None else 0)
            if not self._ledger.fits(idle + kept, rows=held):
                self._batches.drop_idle()
        if self._eyes is not None:
            for reader, reads in (("prefill", self._batches.reading), ("scoring", self._scoring.busy)):
                if not reads:
                    self._eyes.rest(reader)
        self._prefix_reuse.follow(self._policies.snapshot())
        self._ledger.leave_rest(rows=held)

    def give_back(self) -> Released:
        """Answers the first of `releases`: KV that no row needs and what MLX keeps of freed arrays go back to the
        system; no step may be in flight. What is in use stays, and everything grows again on demand."""
        id = self.releases.popleft().id
        before, held = mx.get_active_memory() + mx.get_cache_memory(), self._batches.nbytes
        kept = self._prefix_reuse.clear() + (self._eyes.clear() if self._eyes is not None else 0)
        self._policies.trim()
        self._shrink()
        after = mx.get_active_memory() + mx.get_cache_memory()
        return Released(id, max(0, before - after), kept + max(0, held - self._batches.nbytes))

    def _shrink(self) -> None:
        self._batches.shrink()
        mx.clear_cache()
        self._shown = None

    @property
    def pictures(self) -> PictureStatus:
        return self._eyes.status if self._eyes is not None else PictureStatus()

    def status(self) -> MemoryStatus:
        now, policies = self._clock(), self._policies
        # A version that came or went while nothing runs is told at once: the next look may be far.
        known = self._shown is not None and (self._shown.slots, self._shown.sets) == (
            policies.slot_bytes,
            policies.set_bytes,
        )
        if self._shown is None or not known or now - self._shown_at >= FRESH_S:
            self._shown, self._shown_at = self._look(), now
        return self._shown

    def _look(self) -> MemoryStatus:
        info = self._info
        return MemoryStatus(
            weights=info.weight_bytes,
            kv_limit=info.kv_memory,
            kv_held=self._batches.nbytes,
            kv_filled=self._batches.filled_cells * info.kv_bytes_per_token,
            kv_kept=self._prefix_reuse.status.nbytes,
            kv_prompts=self._queue.kept_cells() * info.kv_bytes_per_token,
            kv_scored=self._scoring.nbytes,
            kv_pictures=self._eyes.nbytes if self._eyes is not None else 0,
            slots=self._policies.slot_bytes,
            sets=self._policies.set_bytes,
            active=mx.get_active_memory(),
            cached=mx.get_cache_memory(),
            peak=mx.get_peak_memory(),
        )
